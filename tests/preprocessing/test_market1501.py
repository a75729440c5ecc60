"""Market-1501: three folders, three splits; junk and distractors are never paired."""

from pathlib import Path

import pytest

from preprocessing.datasets.market1501 import DATASET
from preprocessing.listing import Photo, Reject

NAMES = {
    "bounding_box_train": ["0002_c1s1_000451_03.jpg", "0002_c2s1_000301_01.jpg"],
    "bounding_box_test": [
        "-1_c1s1_000401_03.jpg",
        "0000_c6s3_097167_02.jpg",
        "0001_c1s1_001051_00.jpg",
        "0001_c4s6_000810_05.jpg",
    ],
    "query": ["0001_c1s1_001051_00.jpg"],
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for folder, names in NAMES.items():
        (tmp_path / folder).mkdir()
        for name in [*names, "Thumbs.db"]:
            (tmp_path / folder / name).touch()
    return tmp_path


def photos(root: Path) -> list[Photo]:
    return [item for item in DATASET.list_photos(str(root)) if isinstance(item, Photo)]


def test_each_folder_is_a_split(root: Path) -> None:
    found = photos(root)
    assert len(list(DATASET.list_photos(str(root)))) == len(found)  # Thumbs.db is passed over
    assert [(photo.split, Path(photo.path).name) for photo in found] == [
        (split, name)
        for split, folder in zip(("train", "test", "query"), NAMES, strict=True)
        for name in NAMES[folder]
    ]
    assert all(Path(photo.path).is_file() for photo in found)


def test_person_and_camera_come_from_the_name(root: Path) -> None:
    assert [(photo.person, photo.view) for photo in photos(root)[:3]] == [
        ("0002", "c1"),
        ("0002", "c2"),
        ("-1", "c1"),
    ]


def test_junk_and_distractors_are_listed_but_not_pairable(root: Path) -> None:
    assert {photo.person for photo in photos(root) if not photo.is_pairable} == {"-1", "0000"}


def test_names_stay_unique_when_a_query_is_named_as_a_gallery_image(root: Path) -> None:
    names = [photo.name for photo in photos(root)]
    assert len(set(names)) == len(names)
    assert names[-1] == "query/0001_c1s1_001051_00.jpg"
    assert "0001_c1s1_001051_00.jpg" in names  # the name that the published pairs use


def test_other_names_are_rejects(root: Path) -> None:
    for name in ("0001_c1s1_001051.jpg", "12_c1s1_001051_00.jpg", "copy.png", "readme.txt"):
        (root / "bounding_box_test" / name).touch()
    rejects = [item for item in DATASET.list_photos(str(root)) if isinstance(item, Reject)]
    assert [(Path(reject.path).name, reject.reason) for reject in rejects] == [
        ("0001_c1s1_001051.jpg", "malformed_name"),
        ("12_c1s1_001051_00.jpg", "malformed_name"),
        ("copy.png", "malformed_name"),
        ("readme.txt", "not_an_image"),
    ]


def test_the_folders_may_be_renamed_or_lie_as_the_archive_holds_them(root: Path) -> None:
    expected = [(photo.split, photo.name) for photo in photos(root)]
    (root / "bounding_box_train").rename(root / "train")
    (root / "bounding_box_test").rename(root / "test")
    assert [(photo.split, photo.name) for photo in photos(root)] == expected
    above = root / "Market-1501-v15.09.15"
    above.mkdir()
    for folder in ("train", "test", "query"):
        (root / folder).rename(above / folder)
    assert [(photo.split, photo.name) for photo in photos(root)] == expected


def test_one_folder_is_enough(root: Path) -> None:
    for folder in ("bounding_box_test", "query"):
        (root / folder).rename(root / f"not_{folder}")
    assert {photo.split for photo in photos(root)} == {"train"}


def test_published_csv_files_refer_to_128_by_64(root: Path) -> None:
    for kind in ("annotation", "pairs"):
        (root / f"market-{kind}-test.csv").touch()
    annotations = DATASET.find_annotations(str(root))
    assert annotations.frame == (128, 64)
    assert annotations.keypoints == (str(root / "market-annotation-test.csv"),)
    assert annotations.pairs == {"test": str(root / "market-pairs-test.csv")}


def test_another_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="neither bounding_box_train nor bounding_box_test"):
        photos(tmp_path)
