"""Decides, from the listing alone, which photo gets which key and goes into which shard."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath

import numpy as np
import pyarrow as pa
from jaxtyping import Float, Int

from preprocessing.pairs import number_persons
from shards.format import MAX_KEY_LENGTH, shard_name

_PLAIN_NAME = re.compile(r"[A-Za-z0-9_-]+\.jpg")
_NUM_HASH_DIGITS = 10
_HASHED_KEY = re.compile(r".*-[0-9a-f]{10}")

# JPEG quality 95 of photos at 512x512 takes about 0.17 bytes per pixel; skeleton and record 7 kB.
_BYTES_PER_PIXEL = 0.17
_BYTES_BESIDE_IMAGE = 7_000


@dataclass(frozen=True)
class PlannedShard:
    """Rows `[start, stop)` of the sorted listing, all of one split, that make one shard."""

    split: str
    number: int
    start: int
    stop: int

    @property
    def name(self) -> str:
        """File name of the shard."""
        return shard_name(self.split, self.number)

    @property
    def num_photos(self) -> int:
        """How many photos are meant for it."""
        return self.stop - self.start


def make_key(name: str) -> str:
    """Return the sample key of a photo name: no dots, no odd characters, at most 80 long.

    A name such as `a_1.jpg` gives `a_1`. Anything else gets a hash of the whole name, so that
    `a.1.jpg`, `a/1.jpg` and `a_1.png` stay apart.
    """
    path = PurePosixPath(name)
    is_plain = _PLAIN_NAME.fullmatch(name) and not _HASHED_KEY.fullmatch(path.stem)
    if is_plain and len(path.stem) <= MAX_KEY_LENGTH:
        return path.stem
    readable = re.sub(r"[^A-Za-z0-9_-]", "_", name.removesuffix(path.suffix))
    digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).hexdigest()
    return f"{readable[-(MAX_KEY_LENGTH - _NUM_HASH_DIGITS - 1) :]}-{digest[:_NUM_HASH_DIGITS]}"


def estimate_bytes(image_size: tuple[int, int]) -> int:
    """Estimate what one stored image of a size takes in a shard, its skeleton and record too."""
    return int(image_size[0] * image_size[1] * _BYTES_PER_PIXEL) + _BYTES_BESIDE_IMAGE


def group_starts(photos: pa.Table) -> Int[np.ndarray, " groups"]:
    """Return the first row of each group of photos that one shard must hold together.

    `photos` is sorted by split and person. A group is what one person has in one split; photos of
    ids that never form pairs (junk, distractors: one id for many people) are groups of their own.
    """
    person_ids = number_persons(photos)
    is_start = np.diff(person_ids, prepend=-1) > 0
    num_pairable = np.bincount(person_ids, weights=photos["is_pairable"].to_numpy(), minlength=1)
    return np.flatnonzero(is_start | (num_pairable[person_ids] == 0))


def sample_groups(photos: pa.Table, limit: int, seed: int) -> pa.Table:
    """Keep whole persons, drawn at random by the seed, as long as they are `limit` photos or fewer.

    At least one person is kept, with more photos if it has more. The order stays.
    """
    starts = group_starts(photos)
    sizes = np.diff(starts, append=photos.num_rows)
    splits, persons = photos["split"].take(starts), photos["person"].take(starts)
    order = np.argsort(
        [
            _draw(f"{seed}/{split.as_py()}/{person.as_py()}/{start - starts[0]}")
            for split, person, start in zip(splits, persons, starts, strict=True)
        ]
    )
    num_kept = max(1, int(np.searchsorted(np.cumsum(sizes[order]), limit, side="right")))
    is_kept = np.zeros(len(starts), bool)
    is_kept[order[:num_kept]] = True
    return photos.filter(pa.array(np.repeat(is_kept, sizes)))


def plan_shards(
    photos: pa.Table, num_bytes: Float[np.ndarray, " photos"], shard_size_bytes: int
) -> Iterator[PlannedShard]:
    """Cut the sorted listing into shards of about one size, never through a group.

    `num_bytes` are estimates, from the listing alone: what images really take must not matter, or
    shards could not be made independently of each other.
    """
    starts = group_starts(photos)
    stops = np.append(starts[1:], photos.num_rows)
    group_bytes = np.add.reduceat(num_bytes, starts) if len(starts) else num_bytes
    splits = photos["split"].take(starts).to_pylist()
    number = first = 0
    filled = 0.0
    for group, size in enumerate(group_bytes):
        is_new_split = group > 0 and splits[group] != splits[group - 1]
        if is_new_split or (filled and filled + size > shard_size_bytes):
            yield PlannedShard(splits[group - 1], number, first, int(starts[group]))
            number = 0 if is_new_split else number + 1
            first, filled = int(starts[group]), 0.0
        filled += size
    if len(starts):
        yield PlannedShard(splits[-1], number, first, int(stops[-1]))


def _draw(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")
