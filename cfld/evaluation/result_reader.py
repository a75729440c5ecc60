"""Reads result files and their photos at the size of the protocol, as pairs to score or to show."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from einops import rearrange

from cfld.evaluation.photo_source import Pair, PhotoSource
from cfld.evaluation.result_files import Panel, name_of, read_panel
from cfld.evaluation.scoring import ImagePair, Pixels, map_ahead, protocol_images, protocol_target


@dataclass(frozen=True, kw_only=True)
class ResultReader:
    """Reads the file of each pair at the protocol's size; without a file, the target's photo."""

    files: Mapping[Pair, Path | None]
    photos: PhotoSource
    size: tuple[int, int]
    panel: Panel = field(default_factory=Panel)

    def read_all(self) -> Iterator[ImagePair]:
        """Yield all pairs, decoded ahead on all cores; the target of several is decoded once."""
        of_target = defaultdict(list)
        for pair in self.files:
            of_target[pair[1]].append(pair)
        groups = map_ahead(lambda item: self._read(*item), of_target.items())
        yield from chain.from_iterable(groups)

    def read(self, name: str) -> ImagePair:
        """Read one pair by the name it is scored under, with its source if that is at hand."""
        source, target = next(pair for pair in self.files if name_of(pair) == name)
        (pair,) = self._read(target, [(source, target)])
        if source not in self.photos.places:
            return pair
        return replace(pair, source=protocol_target(self.photos, source, self.size))

    def _read(self, target: str, pairs: Sequence[Pair]) -> list[ImagePair]:
        photo = protocol_target(self.photos, target, self.size)
        return [ImagePair(name_of(pair), self._generated(pair, photo), photo) for pair in pairs]

    def _generated(self, pair: Pair, photo: Pixels) -> Pixels:
        path = self.files[pair]
        if path is None:
            return photo
        image = read_panel(path, self.panel)
        if image.shape[:2] == self.size:
            return image
        batch = rearrange(torch.from_numpy(image.copy()), "h w c -> 1 c h w").float() / 255
        return np.asarray(rearrange(protocol_images(batch, self.size), "1 c h w -> h w c"))
