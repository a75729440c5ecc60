"""A table of photos: csv or parquet with image, person_id and, if known, split and keypoints."""

from __future__ import annotations

import csv
import json
import posixpath
import re
from collections.abc import Iterator
from typing import Any, BinaryIO

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.core import url_to_fs
from jaxtyping import Float32

from cfld.keypoints import KeypointsError, read_pose
from cfld.pose import mark_missing
from preprocessing.files import list_folder, resolve
from preprocessing.listing import Dataset, Photo, Reject

REQUIRED = ("image", "person_id")
OPTIONAL = ("split", "keypoints")

_SUFFIXES = (".csv", ".parquet")
_SPLIT = re.compile(r"[A-Za-z0-9_]+")  # shards are named after it


def list_photos(root: str) -> Iterator[Photo | Reject]:
    """List a table's rows. The root is the table itself or a folder with a single one in it.

    `image` and files in `keypoints` are absolute paths, URLs, or relative to the table's folder; a
    row without a split is of train. `keypoints` is 18 x [x, y, score] as JSON (in parquet also as
    lists), or what `cfld.keypoints.read_pose` takes. A csv's row is one line; row 1 its header.

    Raises:
        FileNotFoundError: If there is no table, or several.
        ValueError: If the file is no such table or a required column is missing.
    """
    table = _find_table(resolve(root))
    listed: dict[str, set[str]] = {}
    for number, row in _read_rows(table):
        place = f"{table}:{number}"
        try:
            photo = _read_photo(row, table.rpartition("/")[0])
        except KeypointsError as error:
            yield Reject(path=place, stage="listing", reason="bad_keypoints", detail=str(error))
        except ValueError as error:
            yield Reject(path=place, stage="listing", reason="malformed_row", detail=str(error))
        else:
            if _is_there(photo.path, listed):
                yield photo
            else:
                yield Reject(path=photo.path, stage="listing", reason="missing_image", detail=place)


def _find_table(root: str) -> str:
    if root.lower().endswith(_SUFFIXES):
        return root
    tables = [name for name in list_folder(root)[1] if name.lower().endswith(_SUFFIXES)]
    if len(tables) != 1:
        raise FileNotFoundError(
            f"{root}: one table is needed, a .csv or .parquet file with the columns "
            f"{', '.join(REQUIRED)}; found {', '.join(tables) or 'none'}. Give the table as root"
        )
    return f"{root}/{tables[0]}"


def _read_rows(table: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield rows with their numbers; one without a value for each column is empty."""
    if table.lower().endswith(".parquet"):
        with fsspec.open(table, "rb") as file:
            yield from enumerate(_parse_parquet(file, table), 1)
    else:
        # Excel starts a file with a byte order mark. A row is a line: a quote that nobody closes
        # must not swallow the rows below it.
        with fsspec.open(table, "rt", encoding="utf-8-sig", errors="replace") as lines:
            columns = [name.strip() for name in _parse_line(next(lines, ""))]
            _check_columns(table, columns)
            for number, line in enumerate(lines, 2):
                values = _parse_line(line)
                is_whole = len(values) == len(columns)
                if line.strip():
                    yield number, dict(zip(columns, values, strict=True)) if is_whole else {}


def _parse_line(line: str) -> list[str]:
    try:
        return next(csv.reader([line], strict=True), [])
    except csv.Error:
        return []


def _parse_parquet(file: BinaryIO, table: str) -> Iterator[dict[str, Any]]:
    try:
        parquet = pq.ParquetFile(file)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{table}: is no parquet file: {error}") from error
    columns = parquet.schema_arrow.names
    _check_columns(table, columns)
    wanted = [name for name in REQUIRED + OPTIONAL if name in columns]
    for batch in parquet.iter_batches(1000, columns=wanted):
        yield from batch.to_pylist()


def _check_columns(table: str, columns: list[str]) -> None:
    missing = [name for name in REQUIRED if name not in columns]
    if missing:
        raise ValueError(
            f"{table}: has no column {' and no column '.join(missing)}; its columns are "
            f"{', '.join(columns) or 'none'}. Needed: {', '.join(REQUIRED)}; optional: "
            f"{', '.join(OPTIONAL)}"
        )


def _read_photo(row: dict[str, Any], folder: str) -> Photo:
    """Turn a row into a photo.

    Raises:
        KeypointsError: If the keypoints cannot be used.
        ValueError: If anything else cannot.
    """
    if not row:
        raise ValueError("is not one value for each column")
    row = {name: None if value != value else value for name, value in row.items()}  # NaN
    image, person = ("" if row[name] is None else str(row[name]).strip() for name in REQUIRED)
    split = str(row.get("split") or "train").strip()
    if not image or not person:
        raise ValueError(f"{'image' if person else 'person_id'} is empty")
    if not _SPLIT.fullmatch(split):
        raise ValueError(f"split {split!r} is not made of letters, digits and _")
    path = _below(folder, image)
    return Photo(
        path=path,
        name=path.removeprefix(f"{folder}/"),
        person=person,
        split=split,
        keypoints=_read_keypoints(row.get("keypoints"), folder),
    )


def _below(folder: str, path: str) -> str:
    if "://" in path:
        return path
    return f"{folder}/{posixpath.normpath(path)}" if not path.startswith("/") else path


def _read_keypoints(
    value: str | list[Any] | None, folder: str
) -> Float32[np.ndarray, "18 3"] | None:
    if not value:
        return None
    try:
        if isinstance(value, str) and not value.lstrip().startswith("["):
            return read_pose(_below(folder, value.strip()))
        return _parse_keypoints(json.loads(value) if isinstance(value, str) else value)
    except (OSError, TypeError, ValueError) as error:
        raise KeypointsError(str(error)) from error


def _parse_keypoints(values: Any) -> Float32[np.ndarray, "18 3"]:
    points = np.array(values, dtype=np.float32)  # null is NaN
    if points.shape not in ((18, 3), (54,)):
        raise ValueError(f"keypoints of shape {points.shape}, expected 18 x [x, y, score]")
    points = points.reshape(18, 3)
    if np.isinf(points).any():
        raise ValueError("a keypoint is not finite; a missing joint is null, null, 0")
    if (points < 0).any():
        raise ValueError("a keypoint is negative; a missing joint is null, null, 0")
    return mark_missing(points)


def _is_there(path: str, listed: dict[str, set[str]]) -> bool:
    """Whether an image exists, by one listing per folder; `listed` keeps what was seen.

    Raises:
        ValueError: If the store of the image cannot be asked.
    """
    folder, _, name = path.rpartition("/")
    if folder not in listed:
        try:
            listed[folder] = set(list_folder(folder)[1])
        except Exception:  # each kind of store has its own; many that give files do not list them
            listed[folder] = set()
    if name in listed[folder]:
        return True
    try:
        fs, inner = url_to_fs(path)  # hidden files are not in listings
        return bool(fs.exists(inner))
    except Exception as error:
        raise ValueError(
            f"{path}: cannot be looked up ({type(error).__name__}: {error}); check the address, "
            "the credentials, and that the package for this kind of store is installed"
        ) from error


DATASET = Dataset(
    list_photos=list_photos,
    access="Your own photos: a csv or parquet file with the columns image, person_id and, if you "
    "have them, split and keypoints.",
)
