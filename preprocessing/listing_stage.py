"""Runs a dataset adapter and keeps what it lists as a sorted table with keys: the job's input."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from preprocessing.datasets import DATASETS
from preprocessing.job_settings import JobSettings, SettingsError
from preprocessing.listing import Photo, Reject, to_text
from preprocessing.photo_reader import read_size
from preprocessing.published_keypoints import keep_first
from preprocessing.rejects import rejects_of_columns, rejects_table
from preprocessing.shard_plan import estimate_bytes, make_key, sample_groups
from preprocessing.store import WORK_FOLDER, Store

PHOTOS_FILE = f"{WORK_FOLDER}/photos.parquet"
UNSELECTED_FILE = f"{WORK_FOLDER}/unselected.parquet"
LISTING_REJECTS_FILE = f"{WORK_FOLDER}/listing.rejects.parquet"

_SCHEMA = pa.schema(
    [
        pa.field("path", pa.string()),
        pa.field("name", pa.string()),
        pa.field("person", pa.string()),
        pa.field("split", pa.string()),
        pa.field("view", pa.string()),
        pa.field("is_pairable", pa.bool_()),
        pa.field("keypoints", pa.list_(pa.float32())),
        pa.field("key", pa.string()),
    ]
)
_NUM_BATCH = 4096
_NUM_SIZES_LOOKED_AT = 64


@dataclass(frozen=True)
class PhotoListing:
    """The photos that the job works on, sorted by (split, person, name), and what stays out.

    `unselected` are names that exist but were not asked for.
    """

    photos: pa.Table
    unselected: pa.Array
    rejects: pa.Table

    @property
    def sha256(self) -> str:
        """Hash of what was listed, without the place where it lies."""
        digest = hashlib.sha256()
        for batch in self.photos.drop_columns(["path"]).to_batches(max_chunksize=_NUM_BATCH):
            digest.update(json.dumps(batch.to_pylist()).encode())
        return digest.hexdigest()

    def save(self, store: Store) -> None:
        """Keep the listing, so that a job that is continued works on the same one."""
        store.write_table(LISTING_REJECTS_FILE, self.rejects)
        store.write_table(UNSELECTED_FILE, pa.table({"name": self.unselected}))
        store.write_table(PHOTOS_FILE, self.photos)

    @classmethod
    def load(cls, store: Store) -> PhotoListing | None:
        """Return the listing that was kept, None if there is none."""
        if not store.exists(PHOTOS_FILE):
            return None
        unselected = store.read_table(UNSELECTED_FILE)["name"].combine_chunks()
        return cls(
            store.read_table(PHOTOS_FILE), unselected, store.read_table(LISTING_REJECTS_FILE)
        )


def list_dataset(items: Iterable[Photo | Reject]) -> PhotoListing:
    """Put what an adapter yields into a sorted table; of several photos of one name the first."""
    rejects: list[Reject] = []
    iterator = iter(items)
    batches = []
    while chunk := list(islice(iterator, _NUM_BATCH)):
        rows = []
        for item in chunk:
            if isinstance(item, Reject):
                rejects.append(item)
            elif not _is_text(item):
                rejects.append(Reject(path=item.path, stage="listing", reason="undecodable_name"))
            else:
                rows.append(_row(item))
        batches.append(pa.RecordBatch.from_pylist(rows, _SCHEMA))
    photos = pa.Table.from_batches(batches, _SCHEMA)
    photos, repeated = keep_first(photos)
    duplicates = rejects_of_columns(
        "listing", "duplicate_name", repeated["path"], name=repeated["name"]
    )
    order = [(column, "ascending") for column in ("split", "person", "name")]
    photos = photos.sort_by(order)
    return PhotoListing(
        photos, pa.array([], pa.string()), pa.concat_tables([rejects_table(rejects), duplicates])
    )


def select_photos(
    listing: PhotoListing, *, splits: tuple[str, ...] | None, limit: int | None, seed: int
) -> PhotoListing:
    """Keep the photos of some splits, and of these whole persons up to a limit.

    Raises:
        ValueError: If there is no photo, or none of a split that was asked for.
    """
    photos = listing.photos
    found = sorted(photos["split"].unique().to_pylist())
    if not found:
        raise ValueError(
            "no photo was found in the root: see what is there with --check, or choose the "
            f"adapter that fits with --dataset ({listing.rejects.num_rows} files were left out)"
        )
    for split in found if splits is None else splits:
        if split not in found:
            raise ValueError(f"--splits {split}: the splits of this dataset are {found}")
        if not split.replace("_", "").isalnum() or not split.isascii():
            raise ValueError(
                f"split {split!r}: shards are named after it, so it may only have letters, digits "
                "and underscores; rename it in the dataset"
            )
    selected = photos
    if splits is not None:
        selected = photos.filter(pc.is_in(photos["split"], pa.array(splits)))
    if limit is not None:
        selected = sample_groups(selected, limit, seed)
    if selected.num_rows == photos.num_rows:
        return listing
    is_left = pc.invert(pc.is_in(photos["name"], selected["name"]))
    unselected = photos["name"].filter(is_left).combine_chunks()
    return PhotoListing(selected, unselected, listing.rejects)


def list_selected(settings: JobSettings) -> PhotoListing:
    """List the photos that a job is to work on, with the sizes that the shard plan needs.

    Raises:
        FileNotFoundError: If the root is not this dataset.
        SettingsError: If a table or list cannot be used, or there is no such photo.
    """
    try:
        listing = list_dataset(DATASETS[settings.dataset].list_photos(settings.root))
    except ValueError as error:  # a table or list that cannot be used; it names itself
        raise SettingsError(str(error)) from error
    try:
        listing = select_photos(
            listing, splits=settings.splits, limit=settings.limit, seed=settings.seed
        )
    except ValueError as error:
        raise SettingsError(f"{settings.root}: {error}") from error
    splits = listing.photos["split"].unique().to_pylist()
    sizes = {split: settings.image_size_of(split) for split in splits}
    return replace(listing, photos=with_size_estimates(listing.photos, sizes))


def with_size_estimates(
    photos: pa.Table, image_sizes: Mapping[str, tuple[int, int] | None]
) -> pa.Table:
    """Add the column `estimated_bytes`; where files are kept as they are, from a few of them.

    `image_sizes` has the size of each split, None for files as they are.
    """
    estimates = np.zeros(photos.num_rows)
    for split, size in image_sizes.items():
        rows = np.flatnonzero(pc.equal(photos["split"], split).to_numpy())
        if size is None:
            spread = np.linspace(0, len(rows) - 1, min(len(rows), _NUM_SIZES_LOOKED_AT))
            paths = photos["path"].take(rows[spread.astype(int)]).to_pylist()
            estimates[rows] = estimate_bytes((0, 0)) + _mean_file_size(paths)
        else:
            estimates[rows] = estimate_bytes(size)
    return photos.append_column("estimated_bytes", pa.array(estimates))


def _mean_file_size(paths: Iterable[str]) -> float:
    sizes = [size for path in paths if (size := read_size(path)) is not None]
    return float(np.mean(sizes)) if sizes else 0.0


def _row(photo: Photo) -> dict[str, object]:
    return {
        "path": photo.path,
        "name": photo.name,
        "person": photo.person,
        "split": photo.split,
        "view": photo.view,
        "is_pairable": photo.is_pairable,
        "keypoints": None if photo.keypoints is None else photo.keypoints.ravel(),
        "key": make_key(photo.name),
    }


def _is_text(photo: Photo) -> bool:
    """Whether path and name can be kept as UTF-8."""
    return all(to_text(value) == value for value in (photo.path, photo.name, photo.person))
