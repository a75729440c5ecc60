"""One folder per person, with or without splits above; every file is a photo or a reject."""

from pathlib import Path
from uuid import uuid4

import fsspec
import pytest

from preprocessing.datasets.folder import DATASET
from preprocessing.listing import Photo, Reject


def make(root: str, *files: str) -> None:
    fs, path = fsspec.core.url_to_fs(root)
    for file in files:
        fs.makedirs(f"{path}/{file}".rpartition("/")[0], exist_ok=True)
        fs.pipe_file(f"{path}/{file}", b"")


def photos(root: str) -> list[tuple[str, str, str]]:
    items = DATASET.list_photos(root)
    return [(item.split, item.person, item.name) for item in items if isinstance(item, Photo)]


def rejects(root: str) -> dict[str, str]:
    items = DATASET.list_photos(root)
    return {
        item.path.removeprefix(f"{root}/"): item.reason
        for item in items
        if isinstance(item, Reject)
    }


@pytest.fixture(params=["local", "memory"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path) if request.param == "local" else f"memory:///{uuid4().hex}"


def test_folders_are_persons_of_train(root: str) -> None:
    make(root, "bob/2.png", "bob/1.JPG", "alice b./x.1.webp")
    assert photos(root) == [
        ("train", "alice b.", "alice b./x.1.webp"),
        ("train", "bob", "bob/1.JPG"),
        ("train", "bob", "bob/2.png"),
    ]
    first = next(DATASET.list_photos(root))
    assert first.path == f"{root}/alice b./x.1.webp"


def test_a_level_named_as_splits_is_one(root: str) -> None:
    make(root, "train/bob/1.jpg", "test/bob/1.jpg", "val/eve/1.jpg")
    assert photos(root) == [
        ("test", "bob", "test/bob/1.jpg"),
        ("train", "bob", "train/bob/1.jpg"),
        ("val", "eve", "val/eve/1.jpg"),
    ]


def test_no_file_vanishes(root: str) -> None:
    make(root, "bob/1.jpg", "bob/notes.txt", "bob/cam/2.jpg", "loose.jpg", "README")
    assert rejects(root) == {
        "bob/notes.txt": "not_an_image",
        "bob/cam/2.jpg": "nested_folder",
        "loose.jpg": "not_in_a_person",
        "README": "not_an_image",
    }
    assert len(photos(root)) == 1


def test_no_file_vanishes_beside_splits(root: str) -> None:
    make(root, "train/bob/1.jpg", "train/2.jpg", "extra/eve/1.jpg", "train/bob/cam/1.jpg", "3.jpg")
    assert rejects(root) == {
        "3.jpg": "not_in_a_split",
        "extra/eve/1.jpg": "not_in_a_split",
        "train/2.jpg": "not_in_a_person",
        "train/bob/cam/1.jpg": "nested_folder",
    }


def test_clutter_is_passed_over(root: str) -> None:
    make(root, "bob/1.jpg", "bob/._1.jpg", "bob/.DS_Store", "bob/Thumbs.db", ".cache/eve/1.jpg")
    assert photos(root) == [("train", "bob", "bob/1.jpg")]
    assert not rejects(root)


def test_a_root_without_folders_is_an_error(tmp_path: Path) -> None:
    make(str(tmp_path), "1.jpg")
    with pytest.raises(
        FileNotFoundError, match=r"no folders here. One folder per person is needed"
    ):
        photos(str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"nowhere: there is no such folder"):
        photos(str(tmp_path / "nowhere"))
