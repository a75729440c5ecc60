"""DeepFashion is found in every layout people have, under the published names."""

import gzip
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import fsspec
import pytest

from preprocessing.datasets.deepfashion import DATASET, flat_name, raw_path
from preprocessing.job_settings import JobSettings, SettingsError, with_published_files
from preprocessing.listing import Photo, Reject

# Drawn so that each trap is there: MEN in WOMEN, categories with and without an underscore, a
# category under both genders, the garment number in common between train and test.
NAMES = {
    "train": [
        "fashionMENDenimid0000008001_1front.jpg",
        "fashionMENDenimid0000008001_7additional.jpg",
        "fashionWOMENDenimid0000008002_4full.jpg",
        "fashionWOMENTees_Tanksid0000783805_7additional.jpg",
        "fashionWOMENTees_Tanksid0000783805_3back.jpg",
    ],
    "test": [
        "fashionWOMENTees_Tanksid0000783806_1front.jpg",
        "fashionMENSweatshirts_Hoodiesid0000000102_6flat.jpg",
    ],
}
PATHS = {
    "fashionWOMENTees_Tanksid0000783805_7additional.jpg": (
        "WOMEN/Tees_Tanks/id_00007838/05_7_additional.jpg"
    ),
    "fashionMENDenimid0000008001_1front.jpg": "MEN/Denim/id_00000080/01_1_front.jpg",
    "fashionMENSweatshirts_Hoodiesid0000000102_6flat.jpg": (
        "MEN/Sweatshirts_Hoodies/id_00000001/02_6_flat.jpg"
    ),
}
TREES = ["Img/img_highres", "Img/img_highres/img_highres", "img_highres", "Img", "."]


def touch(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()


def write_lists(root: Path) -> None:
    root.mkdir(parents=True, exist_ok=True)
    for split, names in NAMES.items():
        (root / f"{split}.lst").write_text("\n".join(names) + "\n")


def write_tree(folder: Path) -> None:
    for names in NAMES.values():
        for name in names:
            touch(folder / str(raw_path(name)))


def write_flat(root: Path, folders: tuple[str, str] = ("train_highres", "test_highres")) -> None:
    for folder, names in zip(folders, NAMES.values(), strict=True):
        for name in names:
            touch(root / folder / name)


def photos(root: Path | str) -> list[Photo]:
    return [item for item in DATASET.list_photos(str(root)) if isinstance(item, Photo)]


def rejects(root: Path | str) -> dict[str, list[str]]:
    by_reason: dict[str, list[str]] = {}
    for item in DATASET.list_photos(str(root)):
        if isinstance(item, Reject):
            by_reason.setdefault(item.reason, []).append(item.path)
    return by_reason


def identities(root: Path) -> list[tuple[str, str, str, str | None]]:
    return [(photo.split, photo.name, photo.person, photo.view) for photo in photos(root)]


@pytest.mark.parametrize(("name", "path"), PATHS.items())
def test_published_names_and_raw_paths_map_to_each_other(name: str, path: str) -> None:
    assert raw_path(name) == path
    assert flat_name(path) == name


@pytest.mark.parametrize(
    "name",
    ["WOMEN/Tees_Tanks/id_00007838/05_7_additional.png", "x/MEN/Denim/id_00000080/01_1_front.jpg",
     "MEN/Denim/id_00000080/01_1_front_segment.jpg", "MEN/Denim/id_80/01_1_front.jpg", ""],
)  # fmt: skip
def test_other_names_are_not_mapped(name: str) -> None:
    assert flat_name(name) is None
    assert raw_path(name.replace("/", "")) is None


@pytest.mark.parametrize("tree", TREES)
def test_the_raw_tree_is_found_wherever_it_was_unpacked(tmp_path: Path, tree: str) -> None:
    write_lists(tmp_path)
    write_tree(tmp_path / tree)
    found = photos(tmp_path)
    assert [photo.name for photo in found] == sorted(NAMES["train"]) + sorted(NAMES["test"])
    assert all(Path(photo.path).is_file() for photo in found)
    assert not rejects(tmp_path)


@pytest.mark.parametrize("folders", [("train_highres", "test_highres"), ("train", "test")])
def test_all_layouts_list_the_same(tmp_path: Path, folders: tuple[str, str]) -> None:
    for root in ("raw", "flat"):
        write_lists(tmp_path / root)
    write_tree(tmp_path / "raw" / "Img" / "img_highres")
    write_flat(tmp_path / "flat", folders)
    assert identities(tmp_path / "raw") == identities(tmp_path / "flat")
    assert all(Path(photo.path).is_file() for photo in photos(tmp_path / "flat"))


def test_person_and_view_follow_from_the_name(tmp_path: Path) -> None:
    write_lists(tmp_path)
    write_flat(tmp_path)
    found = {photo.name: photo for photo in photos(tmp_path)}
    photo = found["fashionWOMENTees_Tanksid0000783805_7additional.jpg"]
    assert photo.person == "fashionWOMENTees_Tanksid0000783805"
    assert photo.view == "additional"
    assert Counter(photo.person for photo in found.values())[photo.person] == 2


def test_flattened_copies_win_over_the_tree_and_the_tree_fills_their_gaps(tmp_path: Path) -> None:
    write_lists(tmp_path)
    write_tree(tmp_path)
    write_flat(tmp_path)
    gap = NAMES["train"][0]
    (tmp_path / "train_highres" / gap).unlink()
    paths = {photo.name: photo.path for photo in photos(tmp_path)}
    assert paths.pop(gap) == str(tmp_path / str(raw_path(gap)))
    assert all("_highres/" in path for path in paths.values())
    assert not rejects(tmp_path)


def test_low_resolution_copies_are_not_mixed_with_the_tree(tmp_path: Path) -> None:
    write_lists(tmp_path)
    write_tree(tmp_path)
    write_flat(tmp_path, ("train", "test"))
    assert not [photo.path for photo in photos(tmp_path) if "/train/" in photo.path]
    assert rejects(tmp_path) == {"not_used": [f"{tmp_path}/train", f"{tmp_path}/test"]}


@pytest.mark.parametrize("trees", [("Img/img_highres", "img_highres"), ("Img", "Img/img_highres")])
def test_men_and_women_may_lie_in_different_places(tmp_path: Path, trees: tuple[str, str]) -> None:
    write_lists(tmp_path)
    write_tree(tmp_path / "all")
    for tree, gender in zip(trees, ("WOMEN", "MEN"), strict=True):
        (tmp_path / tree).mkdir(parents=True, exist_ok=True)
        (tmp_path / "all" / gender).rename(tmp_path / tree / gender)
    touch(tmp_path / trees[1] / "stray.jpg")
    found = photos(tmp_path)
    assert [photo.name for photo in found] == sorted(NAMES["train"]) + sorted(NAMES["test"])
    assert all(Path(photo.path).is_file() for photo in found)
    assert rejects(tmp_path) == {"not_listed": [f"{tmp_path}/{trees[1]}/stray.jpg"]}


def test_whatever_cannot_be_used_is_a_reject(tmp_path: Path) -> None:
    write_lists(tmp_path)
    write_tree(tmp_path / "img_highres")
    tree = tmp_path / "img_highres"
    missing = tree / str(raw_path(NAMES["test"][0]))
    missing.unlink()
    unlisted = [
        str(tree / "MEN/odd name.jpg"),
        str(tree / "MEN_old/a.jpg"),
        str(tree / "WOMEN/Skirts/id_00000009/01_1_front.jpg"),
    ]
    for extra in [*unlisted, tree / "MEN" / "notes.txt"]:
        touch(Path(extra))
    touch(tree / "MEN" / "Thumbs.db")
    with (tmp_path / "test.lst").open("a") as lines:
        lines.write(f"\n{NAMES['train'][1]}\nimages/01.jpg\n\n")
    assert rejects(tmp_path) == {
        "missing_image": [str(missing)],
        "not_listed": unlisted,
        "not_an_image": [str(tree / "MEN/notes.txt")],
        "listed_twice": [NAMES["train"][1]],
        "malformed_name": ["images/01.jpg"],
    }
    assert len(photos(tmp_path)) == 6


def test_a_file_name_that_is_no_text_is_a_reject_that_is(tmp_path: Path) -> None:
    write_lists(tmp_path)
    write_tree(tmp_path)
    touch(tmp_path / "MEN" / "caf\udce9.jpg")
    assert rejects(tmp_path) == {"not_listed": [f"{tmp_path}/MEN/caf\\xe9.jpg"]}


def test_lists_may_be_compressed_and_the_root_remote(tmp_path: Path) -> None:
    write_tree(tmp_path / "Img" / "img_highres")
    for split, names in NAMES.items():
        (tmp_path / f"{split}.lst.gz").write_bytes(gzip.compress("\r\n".join(names).encode()))
    root = f"memory://{tmp_path}"
    fs = fsspec.filesystem("memory")
    fs.put(f"{tmp_path}/", f"{tmp_path}/", recursive=True)
    found = photos(root)
    assert [photo.name for photo in found] == [photo.name for photo in photos(tmp_path)]
    assert all(photo.path.startswith("memory://") and fs.exists(photo.path) for photo in found)


@pytest.mark.parametrize("spelling", ["fasion-resize", "fashion-resize"])
def test_published_csv_files_are_found_under_both_spellings(tmp_path: Path, spelling: str) -> None:
    for split in ("train", "test"):
        for kind in ("annotation", "pairs"):
            touch(tmp_path / f"{spelling}-{kind}-{split}.csv")
    annotations = DATASET.find_annotations(str(tmp_path))
    assert annotations.frame == (256, 176)
    assert [Path(path).name for path in annotations.keypoints] == [
        f"{spelling}-annotation-{split}.csv" for split in ("train", "test")
    ]
    assert annotations.pairs == {
        split: str(tmp_path / f"{spelling}-pairs-{split}.csv") for split in ("train", "test")
    }


def frame_of(root: Path, **given: Any) -> tuple[int, int] | None:
    settings = JobSettings(dataset="deepfashion", root=str(root), output="", **given)
    return with_published_files(settings).keypoints_frame


def test_published_keypoints_refer_to_their_frame_wherever_they_lie(tmp_path: Path) -> None:
    assert frame_of(tmp_path, keypoints=("away/mine.CSV",)) == (256, 176)
    assert frame_of(tmp_path, keypoints=("away/1.csv",), keypoints_frame=(9, 8)) == (9, 8)
    assert frame_of(tmp_path, keypoints=("away/a_keypoints.json",)) is None
    assert frame_of(tmp_path) is None
    with pytest.raises(SettingsError, match=r"csv .* deepfashion refer to \(256, 176\), others"):
        frame_of(tmp_path, keypoints=("1.csv", "a.json"))
    touch(tmp_path / "fasion-resize-annotation-test.csv")
    assert frame_of(tmp_path) == (256, 176)
    assert frame_of(tmp_path, keypoints_frame=(1101, 750)) == (1101, 750)
    with pytest.raises(SettingsError, match="no keypoint file is read"):
        frame_of(tmp_path, keypoints_frame=(1101, 750), pose_network="n.onnx")


def test_absent_csv_files_are_no_error(tmp_path: Path) -> None:
    touch(tmp_path / "fasion-resize-pairs-test.csv")
    annotations = DATASET.find_annotations(str(tmp_path))
    assert annotations.keypoints == ()
    assert set(annotations.pairs) == {"test"}


def test_a_root_without_images_says_where_they_were_looked_for(tmp_path: Path) -> None:
    write_lists(tmp_path)
    with pytest.raises(
        FileNotFoundError, match=r"found .*train\.lst.*missing: images \(MEN and WOMEN in Img/img_h"
    ):
        photos(tmp_path)


def test_a_missing_list_says_where_to_get_it(tmp_path: Path) -> None:
    write_lists(tmp_path)
    write_tree(tmp_path)
    (tmp_path / "train.lst").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"missing: train\.lst \(or \.lst\.gz\)\.\n(.|\n)*tengteng95"
    ):
        photos(tmp_path)


@pytest.mark.parametrize("content", [b"text", gzip.compress(b"a.jpg\n" * 99)[:-9]])
def test_a_broken_list_is_an_error(tmp_path: Path, content: bytes) -> None:
    write_lists(tmp_path)
    write_tree(tmp_path)
    (tmp_path / "test.lst").unlink()
    (tmp_path / "test.lst.gz").write_bytes(content)
    with pytest.raises(ValueError, match=r"test\.lst\.gz: cannot be read .*; get it again"):
        photos(tmp_path)


def test_no_root_at_all_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere: there is no such folder"):
        photos(tmp_path / "nowhere")


def test_every_published_name_maps_both_ways_and_gives_the_published_counts(
    tmp_path: Path, shared_dir: Path
) -> None:
    for split in ("train", "test"):
        shutil.copy(shared_dir / "data" / "deepfashion" / f"{split}.lst.gz", tmp_path)
        with gzip.open(tmp_path / f"{split}.lst.gz", "rt") as lines:
            names = lines.read().split()
        paths = [str(raw_path(name)) for name in names]
        assert [flat_name(path) for path in paths] == names
        for folder in {path.rpartition("/")[0] for path in paths}:
            (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        for path in paths:
            (tmp_path / path).touch()
    items = list(DATASET.list_photos(str(tmp_path)))
    found = [item for item in items if isinstance(item, Photo)]
    assert len(found) == len(items) == 52_712
    assert Counter(photo.split for photo in found) == {"train": 48_674, "test": 4_038}
    assert Counter(photo.view for photo in found) == {
        "front": 12_861, "side": 10_923, "back": 10_661, "full": 6_670, "flat": 683,
        "additional": 10_914,
    }  # fmt: skip
