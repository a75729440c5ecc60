"""The pairs of a run's shard sets in one table, and where the bytes of their images lie."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from fsspec.implementations.local import LocalFileSystem
from jaxtyping import Float32, Int

from shards.format import (
    LATENT_SETTINGS,
    FormatError,
    ShardSet,
    keypoints_array,
    open_shards,
)
from train.order import PairSet
from train.shard_cache import Shard


@dataclass(frozen=True, kw_only=True)
class SetConfig:
    """One shard set of a run."""

    url: str
    """Local path or fsspec URL of the set's folder."""
    split: str = "train"
    weight: float = 1.0
    """How often the set's pairs occur in an epoch, see `train.order.PairSet`."""


@dataclass(frozen=True, kw_only=True)
class SetIdentity:
    """What a shard set must be again for a run to continue on it; its place does not matter."""

    dataset: str
    split: str
    weight: float
    num_pairs: int
    manifest_sha256: str


@dataclass(frozen=True, kw_only=True)
class Places:
    """Where one member of every image lies in its shard; size 0 if an image has none."""

    offset: Int[np.ndarray, " rows"]
    size: Int[np.ndarray, " rows"]


@dataclass(frozen=True, kw_only=True)
class PairTable:
    """All pairs and images of several shard sets.

    Pairs, index rows and shards are counted over the sets one after the other. `frame` holds the
    (height, width) of the stored images, which the keypoints refer to.
    """

    identities: tuple[SetIdentity, ...]
    sets: tuple[PairSet, ...]
    source: Int[np.ndarray, " pairs"]
    target: Int[np.ndarray, " pairs"]
    shards: tuple[Shard, ...]
    row_shard: Int[np.ndarray, " rows"]
    image: Places
    latent: Places
    keypoints: Float32[np.ndarray, "rows 18 3"]
    frame: Int[np.ndarray, "rows 2"]
    keys: pa.ChunkedArray
    latents_of: tuple[Mapping[str, Any] | None, ...]
    """Of each set, what its manifest says of the VAE that its latents come from."""

    def pair_keys(self, pairs: Int[np.ndarray, " pairs"]) -> list[tuple[str, str]]:
        """Return the keys of the source and the target image of each pair."""
        return [
            (self.keys[int(self.source[pair])].as_py(), self.keys[int(self.target[pair])].as_py())
            for pair in pairs
        ]

    @property
    def has_latents(self) -> bool:
        """Whether every image of every pair has a stored latent."""
        rows = np.concatenate([self.source, self.target])
        return bool((self.latent.size[rows] > 0).all())


def read_pairs(configs: Sequence[SetConfig]) -> PairTable:
    """Read the indexes and pairs of shard sets.

    Raises:
        FormatError: If one is no complete shard set, or has no pairs in the split asked for.
    """
    parts, num_rows, num_shards = [], 0, 0
    for config in configs:
        part = _read_set(config, num_rows, num_shards)
        parts.append(part)
        num_rows += len(part.row_shard)
        num_shards += len(part.shards)
    return PairTable(
        identities=tuple(identity for part in parts for identity in part.identities),
        sets=tuple(pairs for part in parts for pairs in part.sets),
        source=np.concatenate([part.source for part in parts]),
        target=np.concatenate([part.target for part in parts]),
        shards=tuple(shard for part in parts for shard in part.shards),
        row_shard=np.concatenate([part.row_shard for part in parts]),
        image=_join([part.image for part in parts]),
        latent=_join([part.latent for part in parts]),
        keypoints=np.concatenate([part.keypoints for part in parts]),
        frame=np.concatenate([part.frame for part in parts]),
        keys=pa.chunked_array([chunk for part in parts for chunk in part.keys.chunks]),
        latents_of=tuple(each for part in parts for each in part.latents_of),
    )


def _read_set(config: SetConfig, first_row: int, first_shard: int) -> PairTable:
    shards = open_shards(config.url)
    index, pairs = shards.read_index(), shards.read_pairs(config.split)
    if not pairs.num_rows:
        raise FormatError(
            f"{config.url}: no pairs in split {config.split!r}; it has "
            + ", ".join(f"{n.pairs} in {split!r}" for split, n in shards.manifest.counts.items())
        )
    numbers = {shard.name: first_shard + i for i, shard in enumerate(shards.manifest.shards)}
    names = index["shard"].combine_chunks().dictionary_encode()
    row_shard = np.array([numbers[name] for name in names.dictionary.to_pylist()], np.int64)[
        names.indices.to_numpy()
    ]
    source, target = (pairs[column].to_numpy().astype(np.int64) for column in ("source", "target"))
    pair_shard = row_shard[source]
    if (pair_shard != row_shard[target]).any():
        raise FormatError(f"{config.url}: a pair's two images lie in different shards")
    return PairTable(
        identities=(_identify(shards, config, pairs.num_rows),),
        sets=(PairSet(shards=pair_shard, weight=config.weight),),
        source=source + first_row,
        target=target + first_row,
        shards=tuple(
            Shard(url=_locate(shards, s.name), size_bytes=s.size_bytes, sha256=s.sha256)
            for s in shards.manifest.shards
        ),
        row_shard=row_shard,
        image=_places(index, "image"),
        latent=_places(index, "latent"),
        keypoints=keypoints_array(index),
        frame=np.stack([index["height"].to_numpy(), index["width"].to_numpy()], axis=1),
        keys=index["key"],
        latents_of=(shards.manifest.settings.get(LATENT_SETTINGS),),
    )


def _identify(shards: ShardSet, config: SetConfig, num_pairs: int) -> SetIdentity:
    return SetIdentity(
        dataset=shards.manifest.dataset,
        split=config.split,
        weight=config.weight,
        num_pairs=num_pairs,
        manifest_sha256=hashlib.sha256(shards.manifest.to_json().encode()).hexdigest(),
    )


def differences(stored: Sequence[dict[str, object]], now: Sequence[SetIdentity]) -> list[str]:
    """Say, in words, how shard sets that a state was saved with differ from those of now."""
    if len(stored) != len(now):
        return [f"{len(stored)} shard sets, now {len(now)}"]
    return [
        f"shard set {number}: {name} {before.get(name)!r}, now {value!r}"
        for number, (before, identity) in enumerate(zip(stored, now, strict=True))
        for name, value in asdict(identity).items()
        if before.get(name) != value
    ]


def _locate(shards: ShardSet, name: str) -> str:
    path = shards.path(name)
    is_local = isinstance(shards.fs, LocalFileSystem)
    return path if is_local else str(shards.fs.unstrip_protocol(path))


def _places(index: pa.Table, member: str) -> Places:
    return Places(
        offset=index[f"{member}_offset"].fill_null(0).to_numpy(),
        size=index[f"{member}_size"].fill_null(0).to_numpy(),
    )


def _join(parts: Sequence[Places]) -> Places:
    return Places(
        offset=np.concatenate([part.offset for part in parts]),
        size=np.concatenate([part.size for part in parts]),
    )
