"""A csv or parquet table of photos; each row is a photo or a reject that names the row."""

import json
import re
from pathlib import Path
from typing import Any
from uuid import uuid4

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from preprocessing.datasets.table import DATASET
from preprocessing.listing import Photo, Reject
from tests.keypoint_files import write_openpose_json, write_patn_csv

KEYPOINTS = np.stack([np.arange(18.0), np.arange(18.0) + 20, np.ones(18)], axis=1).astype("f4")
KEYPOINTS[4] = (np.nan, np.nan, 0)
AS_LISTS = [[None, None, 0] if np.isnan(x) else [x, y, score] for x, y, score in KEYPOINTS.tolist()]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in ("a.jpg", "b.jpg", "sub/c.jpg", "sub/.d.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path


def write_csv(root: Path, *lines: str) -> str:
    path = root / "photos.csv"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def photos(root: Path | str) -> list[Photo]:
    return [item for item in DATASET.list_photos(str(root)) if isinstance(item, Photo)]


def rejects(root: Path | str) -> list[Reject]:
    return [item for item in DATASET.list_photos(str(root)) if isinstance(item, Reject)]


def test_rows_become_photos_in_their_order(root: Path) -> None:
    table = write_csv(
        root, "person_id,image,split", "7,b.jpg,", "eve,sub/c.jpg,test", "7,./a.jpg,train"
    )
    found = photos(root)
    assert [(photo.person, photo.name, photo.split) for photo in found] == [
        ("7", "b.jpg", "train"),
        ("eve", "sub/c.jpg", "test"),
        ("7", "a.jpg", "train"),
    ]
    assert [photo.path for photo in found] == [
        str(root / name) for name in ("b.jpg", "sub/c.jpg", "a.jpg")
    ]
    assert photos(table) == found  # the root may be the table itself


def test_parquet_and_csv_give_the_same(
    root: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    rows = {
        "image": [str(root / "a.jpg"), str(root / "sub/c.jpg")],
        "person_id": [1, 2],
        "split": ["test", None],
        "keypoints": [AS_LISTS, None],
        "other": [0.5, 0.5],
    }
    folder = tmp_path_factory.mktemp("parquet")
    pq.write_table(pa.table(rows), folder / "photos.parquet")
    cell = json.dumps(AS_LISTS)
    write_csv(
        root, "image,person_id,split,keypoints", f'{root}/a.jpg,1,test,"{cell}"', "sub/c.jpg,2,,"
    )
    for from_parquet, from_csv in zip(photos(folder), photos(root), strict=True):
        assert (from_parquet.path, from_parquet.person, from_parquet.split) == (
            from_csv.path,
            from_csv.person,
            from_csv.split,
        )
        np.testing.assert_array_equal(from_parquet.keypoints, from_csv.keypoints)
    np.testing.assert_array_equal(photos(root)[0].keypoints, KEYPOINTS)


def test_keypoints_may_lie_in_files_beside_the_table(root: Path) -> None:
    write_openpose_json(root / "sub" / "a.json", KEYPOINTS[None])
    write_patn_csv(root / "poses.CSV", [("b.jpg", KEYPOINTS)])
    write_csv(root, "image,person_id,keypoints", "a.jpg,1,sub/a.json", "b.jpg,1,poses.CSV:b.jpg")
    for photo in photos(root / "photos.csv"):
        np.testing.assert_array_equal(photo.keypoints, KEYPOINTS)


@pytest.mark.parametrize(
    ("cell", "detail"),
    [
        ("gone.json", "No such file"),
        ('"[[1, 2, 1]]"', r"keypoints of shape \(1, 3\), expected 18 x"),
        ('"[1, [2"', "delimiter"),
        (json.dumps(json.dumps([[-1, -1, 1]] * 18)), "negative; a missing joint is null, null, 0"),
        ('"[{}]"', "not 'dict'"),
        (json.dumps(json.dumps([[1e999, 1, 1]] * 18)), "not finite"),
    ],
)
def test_bad_keypoints_are_rejects(root: Path, cell: str, detail: str) -> None:
    write_csv(root, "image,person_id,keypoints", "a.jpg,1,", f"b.jpg,1,{cell}")
    (reject,) = rejects(root)
    assert (reject.path, reject.reason) == (f"{root}/photos.csv:3", "bad_keypoints")
    assert re.search(detail, reject.detail)
    assert len(photos(root)) == 1


@pytest.mark.parametrize(
    ("row", "detail"),
    [
        ("b.jpg", "not one value for each column"),
        ("b.jpg,1,train,x", "not one value for each column"),
        ('"b.jpg,1,train', "not one value for each column"),
        (",1,train", "image is empty"),
        ("b.jpg, ,train", "person_id is empty"),
        ("b.jpg,1,../x", "split '../x' is not made of letters"),
    ],
)
def test_a_malformed_row_is_a_reject_with_its_number(root: Path, row: str, detail: str) -> None:
    write_csv(root, "image,person_id,split", "a.jpg,1,train", row, "", "sub/c.jpg,1,train")
    (reject,) = rejects(root)
    assert (reject.path, reject.reason) == (f"{root}/photos.csv:3", "malformed_row")
    assert detail in reject.detail
    assert [photo.name for photo in photos(root)] == ["a.jpg", "sub/c.jpg"]


def test_an_empty_cell_of_a_parquet_is_a_reject_too(root: Path) -> None:
    rows = {"image": ["a.jpg", None, "b.jpg"], "person_id": [1.0, 1.0, np.nan]}
    pq.write_table(pa.table(rows), root / "photos.parquet")
    assert [(r.path, r.detail) for r in rejects(root)] == [
        (f"{root}/photos.parquet:2", "image is empty"),
        (f"{root}/photos.parquet:3", "person_id is empty"),
    ]


def test_suffixes_may_be_capital_and_headers_spaced(root: Path) -> None:
    (root / "T1.CSV").write_text("image, person_id\na.jpg,1\n")
    assert photos(root) == photos(root / "T1.CSV") != []
    assert photos(root)[0].person == "1"


class BrokenFileSystem(MemoryFileSystem):
    """A store that cannot be asked, by an error of its own kind."""

    protocol = "broken"

    def ls(self, *_: Any, **__: Any) -> list[Any]:
        raise LookupError("no listing")

    def exists(self, path: str, **_: Any) -> bool:
        if "dead" in path:
            raise LookupError("no endpoint")
        return True


def test_images_in_a_store_that_cannot_be_asked_are_an_error(root: Path) -> None:
    fsspec.register_implementation("broken", BrokenFileSystem, clobber=True)
    write_csv(root, "image,person_id", "broken://b/a.jpg,1")
    assert [photo.path for photo in photos(root)] == ["broken://b/a.jpg"]
    write_csv(root, "image,person_id", "broken://dead/a.jpg,1")
    with pytest.raises(ValueError, match=r"dead/a.jpg: cannot be looked up \(LookupError: no end"):
        photos(root)


def test_a_missing_image_is_a_reject_and_a_hidden_one_is_not(root: Path) -> None:
    write_csv(root, "image,person_id", "gone.jpg,1", "nowhere/a.jpg,1", "sub/.d.jpg,1")
    assert [(r.path, r.reason, r.detail) for r in rejects(root)] == [
        (f"{root}/gone.jpg", "missing_image", f"{root}/photos.csv:2"),
        (f"{root}/nowhere/a.jpg", "missing_image", f"{root}/photos.csv:3"),
    ]
    assert [photo.name for photo in photos(root)] == ["sub/.d.jpg"]


def test_excel_and_other_encodings_are_read(root: Path) -> None:
    content = b"\xef\xbb\xbfimage,person_id\r\na.jpg,Ren\xe9\r\nb.jpg,Ren\xc3\xa9\r\n"
    (root / "photos.csv").write_bytes(content)
    assert [photo.person for photo in photos(root)] == ["Ren\N{REPLACEMENT CHARACTER}", "René"]


def test_table_and_images_may_be_remote() -> None:
    root = f"memory:///{uuid4().hex}"
    fs = fsspec.filesystem("memory")
    fs.pipe_file(
        f"{root}/photos.csv", f"image,person_id\na.jpg,1\n{root}/b.jpg,1\nc.jpg,1\n".encode()
    )
    for name in ("a.jpg", "b.jpg"):
        fs.pipe_file(f"{root}/{name}", b"")
    assert [photo.path for photo in photos(root)] == [f"{root}/a.jpg", f"{root}/b.jpg"]
    assert [reject.reason for reject in rejects(root)] == ["missing_image"]


def test_a_missing_column_is_an_error_that_lists_what_is_there(root: Path) -> None:
    write_csv(root, "image;person_id", "a.jpg;1")
    with pytest.raises(
        ValueError,
        match=r"no column image and no column person_id; its columns are image;person_id. Needed",
    ):
        photos(root)
    (root / "photos.csv").unlink()
    pq.write_table(pa.table({"image": ["a.jpg"], "id": ["1"]}), root / "photos.parquet")
    with pytest.raises(ValueError, match=r"no column person_id; its columns are image, id. Needed"):
        photos(root)


def test_a_file_that_is_no_parquet_is_an_error(root: Path) -> None:
    (root / "photos.parquet").write_text("image,person_id")
    with pytest.raises(ValueError, match=r"photos.parquet: is no parquet file"):
        photos(root)


def test_no_table_or_several_are_errors(root: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"one table is needed.*found none"):
        photos(root)
    for name in ("1.csv", "2.parquet"):
        (root / name).touch()
    with pytest.raises(FileNotFoundError, match=r"found 1.csv, 2.parquet. Give the table as root"):
        photos(root)
    with pytest.raises(FileNotFoundError, match=r"nothing.csv"):
        photos(root / "nothing.csv")
