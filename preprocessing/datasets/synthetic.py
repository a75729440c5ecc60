"""Drawn persons in the place of a dataset: the folder that `preprocessing.draw_figures` leaves."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from preprocessing.figure_set import SETTINGS, TABLE
from preprocessing.listing import Dataset, Photo, Reject


def list_photos(root: str) -> Iterator[Photo | Reject]:
    """List a drawn set."""
    if not (Path(root) / SETTINGS).is_file():
        raise FileNotFoundError(
            f"{root}: no complete set of drawn figures ({SETTINGS} is missing); "
            f"draw one: python -m preprocessing.draw_figures --output {root}"
        )
    return _photos(Path(root), pq.read_table(Path(root) / TABLE))


DATASET = Dataset(
    list_photos=list_photos,
    access="drawn on this machine: python -m preprocessing.draw_figures --help",
)


def _photos(folder: Path, table: pa.Table) -> Iterator[Photo]:
    for row in table.to_pylist():
        yield Photo(
            path=str(folder / row["image"]),
            name=row["image"],
            person=row["person_id"],
            split=row["split"],
            view=row["view"],
            keypoints=np.array(row["keypoints"], np.float32),
        )
