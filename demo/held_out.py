"""Pairs of persons that were never trained on, each also with the photo of a wrong person."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from cfld.evaluation.result_files import name_of
from cfld.images import decode_image, resize_image
from shards.format import ShardSet, open_shards

REGIONS_FOLDER = "regions"


@dataclass(frozen=True)
class HeldOutPair:
    """Index rows of a shard set: a person, the same in another pose, and somebody else."""

    source: int
    target: int
    wrong_source: int


def choose_pairs(shards: ShardSet, per_person: int) -> list[HeldOutPair]:
    """Choose so many pairs of every test person; the wrong sources are test persons too."""
    generator = np.random.default_rng(0)
    person = np.array(shards.read_index(["person"])["person"].to_pylist())
    pairs = shards.read_pairs("test")
    sources, targets = pairs["source"].to_numpy(), pairs["target"].to_numpy()
    chosen = []
    for one in np.unique(person[sources]):
        of_one = np.flatnonzero(person[sources] == one)
        others = np.unique(sources[person[sources] != one])
        for row in generator.choice(of_one, min(per_person, len(of_one)), replace=False):
            wrong = generator.choice(others)
            chosen.append(HeldOutPair(int(sources[row]), int(targets[row]), int(wrong)))
    return chosen


class HeldOut:
    """The chosen pairs of a shard set of drawn persons, with everything that is known of them."""

    def __init__(self, shards_folder: Path, figures_folder: Path, per_person: int) -> None:
        self._shards = open_shards(str(shards_folder))
        self._figures = figures_folder
        members = [f"{member}_{of}" for member in ("image", "pose") for of in ("offset", "size")]
        columns = ["key", "name", "split", "shard", "height", "width", *members]
        self._index = self._shards.read_index(columns).to_pylist()
        self.pairs = choose_pairs(self._shards, per_person)

    @property
    def rightly_named(self) -> list[tuple[str, str]]:
        """Names of source and target of each pair."""
        return [(self._key(pair.source), self._key(pair.target)) for pair in self.pairs]

    @property
    def wrongly_named(self) -> list[tuple[str, str]]:
        """Names of the wrong person's source and of the target of each pair."""
        return [(self._key(pair.wrong_source), self._key(pair.target)) for pair in self.pairs]

    def photos(self, rows: Sequence[int]) -> UInt8[np.ndarray, "images height width 3"]:
        """Decode images of the set."""
        return np.stack(
            [
                decode_image(self._shards.read_member(self._index[row], "image") or b"")
                for row in rows
            ]
        )

    def skeletons(self, rows: Sequence[int]) -> UInt8[np.ndarray, "images height width 3"]:
        """Read the drawn skeletons of images, at the images' size."""
        skeletons = []
        for row in rows:
            image = self._index[row]
            drawn = decode_image(self._shards.read_member(image, "pose") or b"")
            skeletons.append(resize_image(drawn, (image["height"], image["width"])))
        return np.stack(skeletons)

    def target_regions(self) -> UInt8[np.ndarray, "pairs height width"]:
        """What each pixel of the targets shows."""
        return np.stack(
            [
                np.asarray(Image.open(self._figures / REGIONS_FOLDER / self._name(pair.target)))
                for pair in self.pairs
            ]
        )

    def mean_photo(self) -> UInt8[np.ndarray, "height width 3"]:
        """The mean of all training images."""
        rows = [row for row, image in enumerate(self._index) if image["split"] == "train"]
        mean: UInt8[np.ndarray, "height width 3"] = (
            self.photos(rows).mean(axis=0).round().astype(np.uint8)
        )
        return mean

    def _key(self, row: int) -> str:
        return str(self._index[row]["key"])

    def _name(self, row: int) -> str:
        return str(self._index[row]["name"])


def write_pairs(path: Path, pairs: Sequence[tuple[str, str]]) -> None:
    """Write a list of pairs as `cfld.evaluate --pairs` reads it."""
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("from", "to"), *pairs])


def read_generated(
    folder: Path, pairs: Sequence[tuple[str, str]]
) -> UInt8[np.ndarray, "pairs height width 3"]:
    """Read what `cfld.evaluate --weights` generated for pairs."""
    files = [folder / "images" / f"{name_of(pair)}.png" for pair in pairs]
    return np.stack([decode_image(file.read_bytes()) for file in files])


def count_images(shards_folder: Path) -> int:
    """Count the images of a shard set."""
    counts = open_shards(str(shards_folder)).manifest.counts
    return sum(of_split.images for of_split in counts.values())
