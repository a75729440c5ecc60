"""Finds keypoints: the photo's own, a published file's, or a pose network's on a pool of actors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import UInt8

from cfld.images import ImageError, decode_image
from cfld.pose_network import PoseEstimator, PoseEstimatorConfig
from preprocessing.actor_pool import answer, run_actors
from preprocessing.photo_reader import PhotoStoreError, read_ahead
from preprocessing.published_keypoints import KEYPOINTS_SCHEMA
from preprocessing.rejects import rejects_of_columns
from preprocessing.store import WORK_FOLDER, OutputError, Store

PARTS_FOLDER = f"{WORK_FOLDER}/keypoints"

# What is lost with an actor.
NUM_BLOCK = 64


def estimate_keypoints(
    photos: pa.Table,
    store: Store,
    config: PoseEstimatorConfig,
    num_workers: int,
    advance: Callable[[int], object],
) -> None:
    """Run the pose network on all photos whose part file is not there yet.

    Paths go out, numbers of finished photos come back (to `advance`): decoded photos stay in the
    actor. Blocks are fixed by the listing, so that batches, and with them every last bit of the
    results, do not depend on what was finished before.
    """
    blocks = [
        photos.slice(start, NUM_BLOCK).append_column("part", pa.repeat(_part(start), length))
        for start, length in _pending(photos.num_rows, store)
    ]
    if not blocks:
        return
    run_actors(
        KeypointActor,
        (store, config),
        blocks,
        num_workers,
        advance,
        # An ONNX network runs on the CPU, whatever there is.
        use_gpus=not config.network.lower().endswith(".onnx"),
    )


def count_finished(num_photos: int, store: Store) -> int:
    """Return how many of the photos have their keypoints already."""
    return num_photos - sum(length for _, length in _pending(num_photos, store))


def read_estimates(store: Store) -> pa.Table:
    """Return the keypoints of all part files."""
    names = store.names(PARTS_FOLDER)
    tables = [store.read_table(f"{PARTS_FOLDER}/{name}") for name in names]
    return pa.concat_tables([KEYPOINTS_SCHEMA.empty_table(), *tables])


class KeypointActor:
    """Holds a pose network; writes the keypoints of each block to a part file of its own."""

    def __init__(self, store: Store, config: PoseEstimatorConfig) -> None:
        self._store = store
        self._estimator = PoseEstimator(config)

    def __call__(self, block: pa.Table) -> pa.Table:
        """Process a block; processing it again leaves the same file."""
        return answer(self._process, block, (OutputError, PhotoStoreError))

    def _process(self, block: pa.Table) -> None:
        photos = zip(block["name"].to_pylist(), read_ahead(block["path"].to_pylist()), strict=True)
        rows: list[dict[str, Any]] = []
        while batch := list(islice(photos, self._estimator.config.batch_size)):
            rows += self._estimate(dict(batch))
        part = f"{PARTS_FOLDER}/{block['part'][0]}"
        self._store.write_table(part, pa.Table.from_pylist(rows, KEYPOINTS_SCHEMA))

    def _estimate(self, files: Mapping[str, Future[bytes]]) -> list[dict[str, Any]]:
        """Return a row for each photo, by name; no more are decoded at once than the network's."""
        photos = {name: _decode(data) for name, data in files.items()}
        images = [photo for photo in photos.values() if not isinstance(photo, ImageError)]
        poses = iter(self._estimator.estimate(images))
        rows: list[dict[str, Any]] = []
        for name, photo in photos.items():
            if isinstance(photo, ImageError):
                rows.append({"name": name, "reason": photo.reason, "detail": photo.detail})
            else:
                pose = next(poses)
                keypoints = pose.keypoints.ravel()
                rows.append({"name": name, "keypoints": keypoints, "num_people": pose.num_people})
        return rows


@dataclass(frozen=True)
class FoundKeypoints:
    """What was found, and which of its rows belongs to each photo (null: none).

    It is joined to a few photos at a time: a copy for all of them would double the job's memory.
    """

    table: pa.Table
    rows: pa.Array

    @classmethod
    def of(cls, photos: pa.Table, table: pa.Table) -> FoundKeypoints:
        """Match photos and keypoints by name."""
        rows = pc.index_in(photos["name"].combine_chunks(), table["name"].combine_chunks())
        return cls(table.combine_chunks(), rows)

    def join(self, photos: pa.Table, start: int, num_photos: int) -> pa.Table:
        """Return a slice of the photos with the columns of what was found, before what they bring.

        Photos that were rejected are left out.
        """
        part = photos.slice(start, num_photos)
        found = self.table.take(self.rows.slice(start, num_photos))
        keypoints = pc.coalesce(found["keypoints"], part["keypoints"])
        part = part.drop_columns(["keypoints"]).append_column("keypoints", keypoints)
        for name in ("frame_height", "frame_width", "num_people"):
            part = part.append_column(name, found[name])
        return part.filter(pc.is_null(found["reason"]))

    def rejects(self, photos: pa.Table) -> pa.Table:
        """Return the rejects of photos that this stage could not read or decode."""
        is_bad = pc.is_valid(self.table["reason"].take(self.rows))
        bad, found = photos.filter(is_bad), self.table.take(pc.filter(self.rows, is_bad))
        return rejects_of_columns(
            "keypoints", found["reason"], bad["path"], name=bad["name"], detail=found["detail"]
        )


def _pending(num_photos: int, store: Store) -> Iterator[tuple[int, int]]:
    """Yield start and length of the blocks that have no part file."""
    finished = set(store.names(PARTS_FOLDER))
    for start in range(0, num_photos, NUM_BLOCK):
        if _part(start) not in finished:
            yield start, min(NUM_BLOCK, num_photos - start)


def _part(start: int) -> str:
    return f"{start:09d}.parquet"


def _decode(data: Future[bytes]) -> UInt8[np.ndarray, "height width 3"] | ImageError:
    try:
        return decode_image(data.result())
    except ImageError as error:
        return error
