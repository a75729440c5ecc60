"""Fréchet distance between two sets of features, from statistics gathered in constant memory."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.linalg
from jaxtyping import Float, Float64

_MERGE_SIZE = 512


@dataclass(frozen=True, kw_only=True)
class FeatureStatistics:
    """Count, mean and scatter matrix (sum of outer products of deviations) of a set of features.

    Float64; parts of a set may be gathered anywhere and merged.
    """

    count: int
    mean: Float64[np.ndarray, " dim"]
    scatter: Float64[np.ndarray, "dim dim"]

    @classmethod
    def empty(cls, dim: int) -> FeatureStatistics:
        """Return the statistics of no features."""
        return cls(count=0, mean=np.zeros(dim), scatter=np.zeros((dim, dim)))

    @classmethod
    def of(cls, features: Float[np.ndarray, "batch dim"]) -> FeatureStatistics:
        """Return the statistics of one batch."""
        values = features.astype(np.float64)
        mean = values.mean(0)
        deviations = values - mean
        return cls(count=len(values), mean=mean, scatter=deviations.T @ deviations)

    def merge(self, other: FeatureStatistics) -> FeatureStatistics:
        """Return the statistics of both sets (Chan et al. 1979: no cancellation)."""
        count = self.count + other.count
        delta = other.mean - self.mean
        weight = self.count * other.count / count
        return FeatureStatistics(
            count=count,
            mean=self.mean + delta * (other.count / count),
            scatter=self.scatter + other.scatter + weight * np.outer(delta, delta),
        )

    @property
    def covariance(self) -> Float64[np.ndarray, "dim dim"]:
        """The sample covariance.

        Raises:
            ValueError: If the set holds fewer than two images.
        """
        if self.count < 2:
            raise ValueError(
                f"a Fréchet distance needs at least 2 images on either side, here there is "
                f"{self.count}; score a larger set or leave FID out"
            )
        return self.scatter / (self.count - 1)


class FeatureStream:
    """Gathers the statistics of features that come in batches, in constant memory."""

    def __init__(self, dim: int) -> None:
        self._statistics = FeatureStatistics.empty(dim)
        self._waiting: list[np.ndarray] = []

    def add(self, features: Float[np.ndarray, "batch dim"]) -> None:
        """Take in a batch. Small ones wait for others: a merge costs as much as many images."""
        self._waiting.append(features)
        if sum(map(len, self._waiting)) >= _MERGE_SIZE:
            self._merge()

    def statistics(self) -> FeatureStatistics:
        """Return the statistics of all that came so far."""
        if self._waiting:
            self._merge()
        return self._statistics

    def _merge(self) -> None:
        batch = FeatureStatistics.of(np.concatenate(self._waiting))
        self._statistics, self._waiting = self._statistics.merge(batch), []


def frechet_distance(first: FeatureStatistics, second: FeatureStatistics) -> float:
    """Return |m1 - m2|² + tr(C1 + C2 - 2 (C1 C2)^½), the FID of two sets of Inception features.

    With C1 = A A', C2 = B B' the root's trace is the sum of the singular values of A' B. This needs
    no root of a product that may be singular, so it is exact for few samples too.

    Raises:
        ValueError: If a set holds fewer than two images.
    """
    delta = first.mean - second.mean
    root_1, root_2 = _root(first), _root(second)
    root_trace = np.linalg.svd(root_1.T @ root_2, compute_uv=False).sum()
    traces = np.trace(first.covariance) + np.trace(second.covariance)
    return max(0.0, float(delta @ delta + traces - 2 * root_trace))


def _root(statistics: FeatureStatistics) -> Float64[np.ndarray, "dim rank"]:
    """Return A with A A' = covariance, without the columns that are zero up to rounding."""
    dim = len(statistics.mean)
    lowest = max(0, dim - statistics.count + 1)  # the rank is at most count - 1
    which = {"subset_by_index": (lowest, dim - 1)} if lowest else {"driver": "evd"}
    values, vectors = scipy.linalg.eigh(statistics.covariance, **which)
    is_kept = values > dim * np.finfo(np.float64).eps * values[-1]
    return vectors[:, is_kept] * np.sqrt(values[is_kept])
