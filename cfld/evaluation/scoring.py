"""Score pairs of generated and target images: a stream in, scores and FID statistics out."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Float64, UInt8
from PIL import Image
from torch import Tensor

from cfld.evaluation.frechet import FeatureStatistics, FeatureStream, frechet_distance
from cfld.evaluation.metric_networks import FEATURE_DIM, MetricNetworks, network_sha256
from cfld.evaluation.photo_source import PhotoSource
from cfld.metrics import PAIR_METRICS, pair_metrics
from cfld.whole_file import whole_file

logger = logging.getLogger(__name__)

BATCH_SIZE = 16

Pixels = UInt8[np.ndarray, "height width 3"]
Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class ImagePair:
    """One generated image and its target, at the size of the protocol."""

    name: str
    generated: Pixels
    target: Pixels
    source: Pixels | None = None
    """Where it is at hand and wanted."""


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A mean over images with its 95 % bootstrap interval; None where a value is not finite."""

    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True, kw_only=True)
class ScoreSet:
    """Scores of a set of pairs: per image and metric, FID features, and metrics not to be had."""

    names: tuple[str, ...]
    per_image: Mapping[str, Float64[np.ndarray, " images"]]
    features: Mapping[str, FeatureStatistics]
    missing: Mapping[str, str]

    def undefined(self, metric: str) -> tuple[str, ...]:
        """Return the images that a metric is not defined for (NaN); means leave them out."""
        return tuple(np.asarray(self.names)[np.isnan(self.per_image[metric])])

    def means(self) -> dict[str, float]:
        """Return each metric's mean over the images that it is defined for."""
        return {
            metric: float(np.nanmean(values)) if not np.isnan(values).all() else np.nan
            for metric, values in self.per_image.items()
        }

    @cached_property
    def intervals(self) -> dict[str, Interval]:
        """Each metric's mean and its bootstrap interval over the images."""
        return {
            metric: bootstrap_interval(values[~np.isnan(values)], num_resamples=1000, seed=0)
            for metric, values in self.per_image.items()
        }

    def fids(self, references: Mapping[str, FeatureStatistics]) -> dict[str, float]:
        """Return the Fréchet distances to reference statistics of the same features.

        Raises:
            ValueError: If there is but one image on either side.
        """
        return {
            name: frechet_distance(self.features[name], references[name])
            for name in self.features
            if name in references
        }


def protocol_images(
    images: Float[Tensor, "batch 3 height width"], size: tuple[int, int]
) -> UInt8[Tensor, "batch 3 {size[0]} {size[1]}"]:
    """Bring a model's output in [0, 1] to the size (height, width) at which the paper scores it.

    Bicubic with antialiasing, then times 255, clamped and truncated (not rounded), as the authors
    do.

    Raises:
        ValueError: If a value is not finite.
    """
    if not images.isfinite().all():
        bad = (~images.isfinite()).flatten(1).any(1).nonzero().flatten().tolist()
        raise ValueError(
            f"images {bad} of the batch hold NaN or infinite values; see how they came"
        )
    if tuple(images.shape[-2:]) != tuple(size):
        images = F.interpolate(images.float(), tuple(size), mode="bicubic", antialias=True)
    return (images.float() * 255).clamp(0, 255).to(torch.uint8)


def protocol_target(photos: PhotoSource, name: str, size: tuple[int, int]) -> Pixels:
    """Read a photo at (height, width), resized with Pillow's bicubic as the authors do.

    First across, then down: the order of every Pillow before 13, which sometimes swaps it.

    Raises:
        SourceError: If the photo can't be decoded.
    """
    photo = Image.fromarray(photos.decode(name))
    photo = photo.resize((size[1], photo.height), Image.Resampling.BICUBIC)
    return np.asarray(photo.resize((size[1], size[0]), Image.Resampling.BICUBIC))


def score(
    pairs: Iterable[ImagePair],
    networks: MetricNetworks,
    metrics: Sequence[str] = PAIR_METRICS,
) -> ScoreSet:
    """Score pairs as they come, in memory that does not grow with their number.

    All images have one size. `metrics` are the ones that need no network.

    Raises:
        ValueError: If there is no pair, or a metric does not suit the size.
    """
    names: list[str] = []
    columns: dict[str, list[float]] = {}
    streams = {name: FeatureStream(FEATURE_DIM) for name in networks.inceptions}
    for batch in _batches(pairs):
        generated = _to_device([pair.generated for pair in batch], networks.device)
        target = _to_device([pair.target for pair in batch], networks.device)
        values = pair_metrics(generated, target, metrics) if metrics else {}
        if networks.lpips is not None:
            values["lpips"] = networks.lpips(generated, target)
        for name, each in values.items():
            # Plain floats: small tensors kept between large freed ones would split the heap.
            columns.setdefault(name, []).extend(each.tolist())
        for name, inception in networks.inceptions.items():
            streams[name].add(inception(generated).cpu().numpy())
        names += [pair.name for pair in batch]
        if len(names) % (BATCH_SIZE * 64) == 0:
            logger.info("scored %d images", len(names))
    if not names:
        raise ValueError("there is no pair to score")
    return ScoreSet(
        names=tuple(names),
        per_image={name: np.array(each) for name, each in columns.items()},
        features={name: stream.statistics() for name, stream in streams.items()},
        missing=networks.missing,
    )


def reference_statistics(
    photos: PhotoSource,
    size: tuple[int, int],
    networks: MetricNetworks,
    cache_dir: Path,
) -> dict[str, FeatureStatistics]:
    """Return FID statistics of all photos of a source at a size, from the cache if they are there.

    A cache entry is keyed by the photos' hash, the size and the network's parameters.
    """
    paths = {
        name: cache_dir / f"{name}-{_cache_key(photos, size, network)}.npz"
        for name, network in networks.inceptions.items()
    }
    known = {name: _load_statistics(path) for name, path in paths.items() if path.is_file()}
    todo = [name for name in paths if name not in known]
    if not todo:
        return known
    logger.info("computing %s statistics of %d photos", " and ".join(todo), len(photos.places))
    streams = {name: FeatureStream(FEATURE_DIM) for name in todo}
    images = map_ahead(lambda name: protocol_target(photos, name, size), photos.places)
    for batch in _batches(images):
        pixels = _to_device(batch, networks.device)
        for name in todo:
            streams[name].add(networks.inceptions[name](pixels).cpu().numpy())
    gathered = {name: stream.statistics() for name, stream in streams.items()}
    for name, statistics in gathered.items():
        _save_statistics(paths[name], statistics)
    return known | gathered


def bootstrap_interval(
    values: Float64[np.ndarray, " images"], num_resamples: int, seed: int
) -> Interval:
    """Return the mean with the 2.5 and 97.5 % quantiles of means of resampled images."""
    if len(values) == 0 or not np.isfinite(values).all():
        return Interval(value=float(values.mean()) if len(values) else np.nan, low=None, high=None)
    generator = np.random.default_rng(seed)
    means = [
        values[generator.integers(len(values), size=len(values))].mean()
        for _ in range(num_resamples)
    ]
    low, high = np.quantile(means, (0.025, 0.975))
    return Interval(value=float(values.mean()), low=float(low), high=float(high))


def map_ahead(work: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """Map on all cores, in order, a bounded number of items ahead of what is consumed."""
    num_threads = os.cpu_count() or 1
    with ThreadPoolExecutor(num_threads) as pool:
        rest = iter(items)
        ahead = deque(pool.submit(work, item) for item in islice(rest, 4 * num_threads))
        while ahead:
            yield ahead.popleft().result()
            ahead.extend(pool.submit(work, item) for item in islice(rest, 1))


def _batches(items: Iterable[Item]) -> Iterator[list[Item]]:
    rest = iter(items)
    while batch := list(islice(rest, BATCH_SIZE)):
        yield batch


def _to_device(
    images: Sequence[Pixels], device: torch.device
) -> Float[Tensor, "batch 3 height width"]:
    # The memory stays in channels-last order, which metrics and convolutions take as it is.
    stacked = torch.from_numpy(np.stack(images)).to(device)
    return rearrange(stacked, "b h w c -> b c h w").float().div_(255)


def _cache_key(photos: PhotoSource, size: tuple[int, int], network: torch.nn.Module) -> str:
    document = [photos.sha256, list(size), network_sha256(network)]
    return hashlib.sha256(json.dumps(document).encode()).hexdigest()[:32]


def _save_statistics(path: Path, statistics: FeatureStatistics) -> None:
    with whole_file(path) as unfinished, unfinished.open("wb") as file:
        np.savez(file, **vars(statistics))


def _load_statistics(path: Path) -> FeatureStatistics:
    with np.load(path) as arrays:
        return FeatureStatistics(
            count=int(arrays["count"]), mean=arrays["mean"], scatter=arrays["scatter"]
        )
