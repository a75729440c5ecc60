"""Drawn persons in the place of a dataset: the folder that `preprocessing.draw_figures` leaves."""

from __future__ import annotations

from collections.abc import Iterator

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.core import url_to_fs

from preprocessing.figures.drawn_set import SETTINGS, TABLE
from preprocessing.files import resolve
from preprocessing.listing import Dataset, Photo, Reject


def list_photos(root: str) -> Iterator[Photo | Reject]:
    """List a drawn set."""
    root = resolve(root)
    fs, place = url_to_fs(root)
    if not fs.isfile(f"{place}/{SETTINGS}"):
        raise FileNotFoundError(
            f"{root}: no complete set of drawn figures ({SETTINGS} is missing); "
            f"draw one: python -m preprocessing.draw_figures --output {root}"
        )
    with fsspec.open(f"{root}/{TABLE}", "rb") as file:
        return _photos(root, pq.read_table(file))


DATASET = Dataset(
    list_photos=list_photos,
    access="drawn on this machine: python -m preprocessing.draw_figures --help",
)


def _photos(folder: str, table: pa.Table) -> Iterator[Photo]:
    for row in table.to_pylist():
        yield Photo(
            path=f"{folder}/{row['image']}",
            name=row["image"],
            person=row["person_id"],
            split=row["split"],
            view=row["view"],
            keypoints=np.array(row["keypoints"], np.float32),
        )
