"""One method's results by the paper's protocol: scores, FIDs, self-checks, remarks."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from cfld.evaluation.frechet import FeatureStatistics
from cfld.evaluation.metric_networks import NETWORK_METRICS, MetricNetworks, load_metric_networks
from cfld.evaluation.pair_images import ImageJob
from cfld.evaluation.paper_tables import GROUND_TRUTH, TABLE_OF_SIZE, VAE_RECONSTRUCTION
from cfld.evaluation.photo_source import Pair, PhotoSource
from cfld.evaluation.report import Evaluation
from cfld.evaluation.result_files import ResultError
from cfld.evaluation.result_reader import ResultReader
from cfld.evaluation.scoring import reference_statistics, score
from cfld.metrics import PAIR_METRICS, check_windows

logger = logging.getLogger(__name__)

FIDS = ("fid_paper", "fid")
METRICS = (*PAIR_METRICS, *NETWORK_METRICS)


@dataclass(frozen=True, kw_only=True)
class ScoringProtocol:
    """How results are scored: at which size (height, width), by what, FID against which photos."""

    size: tuple[int, int]
    metrics: tuple[str, ...]
    """The ones that need no network."""
    networks: MetricNetworks
    reference: PhotoSource | None
    """None if no FID is wanted, or there are no photos for it."""
    cache: Path

    @cached_property
    def references(self) -> Mapping[str, FeatureStatistics]:
        """FID statistics of the reference photos."""
        if self.reference is None or not self.networks.inceptions:
            return {}
        return reference_statistics(self.reference, self.size, self.networks, self.cache)


def open_protocol(
    size: tuple[int, int],
    metrics: Sequence[str],
    reference: PhotoSource | None,
    *,
    weights_dir: Path | None,
    device: torch.device | str,
    cache: Path,
) -> ScoringProtocol:
    """Load what scoring needs; what can't be had is noted in `networks.missing`.

    Raises:
        ResultError: If a metric does not suit the size, or there are too few reference photos.
    """
    pair_metrics = tuple(name for name in PAIR_METRICS if name in metrics)
    try:
        check_windows(size, pair_metrics)
    except ValueError as error:
        raise ResultError(f"--metrics: {error}") from error
    if not set(FIDS) & set(metrics):
        reference = None
    if reference is not None and len(reference.places) < 2:
        raise ResultError(f"{reference.where}: FID needs at least 2 reference photos, this is 1")
    wanted = [name for name in NETWORK_METRICS if name in metrics]
    without = [] if reference is not None else [name for name in wanted if name in FIDS]
    networks = load_metric_networks(
        [name for name in wanted if name not in without], weights_dir, device
    )
    reasons = dict.fromkeys(without, "it needs the photos of --reference")
    for name, reason in (networks.missing | reasons).items():
        logger.warning("no %s: %s", name, reason)
    return ScoringProtocol(
        size=size,
        metrics=pair_metrics,
        networks=replace(networks, missing=networks.missing | reasons),
        reference=reference,
        cache=cache,
    )


def check_number(num_images: int, protocol: ScoringProtocol) -> None:
    """Check that there are enough images for what is to be computed.

    Raises:
        ResultError: If there is but one, and an FID is wanted.
    """
    if num_images < 2 and protocol.reference is not None:
        raise ResultError(
            f"FID needs at least 2 generated images, this is {num_images}; leave it out of "
            "--metrics"
        )


def evaluate(
    title: str,
    reader: ResultReader,
    protocol: ScoringProtocol,
    *,
    settings: Mapping[str, Any],
    notes: Sequence[str] = (),
    self_checks: Mapping[str, Mapping[str, float]] | None = None,
) -> Evaluation:
    """Score all pairs of a reader."""
    photos, reference = reader.photos, protocol.reference
    scores = score(reader.read_all(), protocol.networks, protocol.metrics)
    about_photos = {
        "targets": photos.where,
        "targets sha256": photos.sha256,
        "FID reference": reference.where if reference else None,
        "FID reference sha256": reference.sha256 if reference else None,
        "FID reference images": len(reference.places) if reference else None,
    }
    return Evaluation(
        title=title,
        size=protocol.size,
        settings={**settings, **about_photos},
        scores=scores,
        fids=scores.fids(protocol.references),
        self_checks=self_checks or {},
        notes=(*notes, *_photo_notes(photos, protocol)),
    )


def check_oneself(job: ImageJob, protocol: ScoringProtocol) -> dict[str, dict[str, float]]:
    """Score the targets of a finished job themselves, and their reconstructions.

    Each target counts as often as it occurs in the pairs, as the generated images do.
    """
    files: dict[str, dict[Pair, Path | None]] = {
        GROUND_TRUTH: dict.fromkeys(job.pairs),
        VAE_RECONSTRUCTION: {pair: job.reconstruction_path(pair[1]) for pair in job.pairs},
    }
    checks = {}
    for label, each in files.items():
        logger.info("scoring the self-check: %s", label)
        reader = ResultReader(files=each, photos=job.photos, size=protocol.size)
        scores = score(reader.read_all(), protocol.networks, protocol.metrics)
        checks[label] = scores.means() | scores.fids(protocol.references)
    return checks


def _photo_notes(photos: PhotoSource, protocol: ScoringProtocol) -> list[str]:
    notes = [photos.note] if photos.note else []
    if protocol.reference is not None and protocol.reference.note:
        notes.append(f"FID reference: {protocol.reference.note}")
    table = TABLE_OF_SIZE.get(protocol.size)
    if table and photos.dataset not in (None, table.dataset):
        notes.append(
            f"The photos are of the dataset {photos.dataset!r}, so that the paper's figures, of "
            f"{table.dataset!r}, do not compare"
        )
    return notes
