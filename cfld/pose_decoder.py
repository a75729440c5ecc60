"""Decoder of OpenPose heatmaps and part affinity fields into people, batched over images.

The rules (thresholds, order of limbs, greedy assembly) are those of Cao et al., "Realtime
Multi-Person 2D Pose Estimation using Part Affinity Fields", as controlnet-aux sets them, so that
both find the same people. All candidate limbs of a batch are scored at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Float32, Int
from torch import Tensor

from cfld.heatmap_peaks import Peaks, find_peaks, sample_enlarged
from cfld.pose import MISSING_JOINT, NUM_JOINTS

# (from, to, first of its two affinity channels), in the order of assembly. The last two only
# complete people that exist already.
LIMBS = (
    (1, 2, 12), (1, 5, 20), (2, 3, 14), (3, 4, 16), (5, 6, 22), (6, 7, 24),
    (1, 8, 0), (8, 9, 2), (9, 10, 4), (1, 11, 6), (11, 12, 8), (12, 13, 10),
    (1, 0, 28), (0, 14, 30), (14, 16, 34), (0, 15, 32), (15, 17, 36), (2, 16, 18), (5, 17, 26),
)  # fmt: skip
NUM_FOUNDING_LIMBS = 17
NUM_HEATMAPS = NUM_JOINTS + 1  # the last one is the background
NUM_AFFINITIES = 2 * len(LIMBS)

_LIMBS_AT_ONCE = 1 << 12


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Thresholds of the decoder, with controlnet-aux's values as defaults."""

    stride: int = 8
    """Pixels of the network's input per cell of its outputs."""
    smoothing_sigma_px: float = 3.0
    """Gaussian over the enlarged heatmaps before peaks are sought."""
    min_peak: float = 0.1
    min_affinity: float = 0.05
    """A sample along a limb agrees if the field's component along the limb exceeds this."""
    min_agreement: float = 0.8
    """More than this share of a limb's samples must agree."""
    num_samples: int = 10
    min_joints: int = 4
    min_mean_score: float = 0.4
    """Scores of a person's joints and limbs, summed and divided by the number of joints."""


def decode_people(
    heatmaps: Float[Tensor, "batch 19 height width"],
    affinities: Float[Tensor, "batch 38 height width"],
    config: DecoderConfig,
) -> list[Float32[np.ndarray, "people 18 3"]]:
    """Find the people of each image, with joints in pixels of the network's input.

    A joint is refined to fractions of a pixel, its score is the heatmap's value there. People
    stand in the order in which they were assembled. Computed in float32 where the tensors are.

    Raises:
        ValueError: If a value is not finite.
    """
    heatmaps, affinities = heatmaps.float(), affinities.float()
    is_finite = torch.cat((heatmaps, affinities), dim=1).flatten(1).isfinite().all(1)
    if not is_finite.all():
        raise ValueError(
            f"images {(~is_finite).nonzero().flatten().tolist()} of the batch have heatmaps or "
            "affinity fields that are not finite; run the network in float32"
        )
    peaks = find_peaks(
        heatmaps[:, :NUM_JOINTS].flatten(0, 1),
        stride=config.stride,
        sigma_px=config.smoothing_sigma_px,
        min_peak=config.min_peak,
    )
    limbs = _score_limbs(affinities, peaks, config)
    joints = torch.column_stack((peaks.points, peaks.scores)).cpu().numpy()
    bounds = np.searchsorted(limbs.group, len(LIMBS) * np.arange(len(heatmaps) + 1))
    return [
        _assemble(joints, _Limbs(*(column[first:last] for column in limbs)), config)
        for first, last in pairwise(bounds)
    ]


class _Limbs(NamedTuple):
    """Accepted limbs of a batch, by image, limb and falling score."""

    group: Int[np.ndarray, " limbs"]  # image · len(LIMBS) + limb
    start: Int[np.ndarray, " limbs"]  # index of a peak
    end: Int[np.ndarray, " limbs"]
    score: Float32[np.ndarray, " limbs"]


def _score_limbs(
    affinities: Float[Tensor, "batch 38 height width"], peaks: Peaks, config: DecoderConfig
) -> _Limbs:
    """Score every pair of joints that a limb could join by the affinity field between them."""
    group, start, end = _candidates(peaks.which.cpu().numpy(), len(affinities))
    first_channel = np.array([channel for _, _, channel in LIMBS])
    field = group // len(LIMBS) * NUM_AFFINITIES + first_channel[group % len(LIMBS)]
    chunks = zip(
        *(
            torch.from_numpy(column).to(affinities.device).split(_LIMBS_AT_ONCE)
            for column in (field, start, end)
        ),
        strict=True,
    )
    fields = affinities.flatten(0, 1)
    scores = torch.cat(
        [
            _score(fields, field, peaks.pixels[start], peaks.pixels[end], config)
            for field, start, end in chunks
        ]
    )
    score = scores.cpu().numpy()
    order = np.lexsort((-score, group))  # stable: ties keep the order of the candidates
    order = order[score[order] > 0]
    return _Limbs(group[order], start[order], end[order], score[order])


def _candidates(
    which: Int[np.ndarray, " peaks"], num_images: int
) -> tuple[Int[np.ndarray, " limbs"], Int[np.ndarray, " limbs"], Int[np.ndarray, " limbs"]]:
    """All pairs of peaks of each limb's two joints in each image: group, start, end."""
    counts = np.bincount(which, minlength=num_images * NUM_JOINTS)
    firsts = (np.cumsum(counts) - counts).reshape(num_images, NUM_JOINTS)
    counts = counts.reshape(num_images, NUM_JOINTS)
    from_joints, to_joints = np.array([limb[:2] for limb in LIMBS]).T
    num_pairs = (counts[:, from_joints] * counts[:, to_joints]).ravel()
    group = np.repeat(np.arange(len(num_pairs)), num_pairs)
    pair = np.arange(len(group)) - np.repeat(np.cumsum(num_pairs) - num_pairs, num_pairs)
    num_ends = counts[:, to_joints].ravel()[group]
    start = firsts[:, from_joints].ravel()[group] + pair // num_ends
    end = firsts[:, to_joints].ravel()[group] + pair % num_ends
    return group, start, end


def _score(
    fields: Float[Tensor, "fields height width"],
    field: Int[Tensor, " limbs"],
    start: Int[Tensor, "limbs 2"],
    end: Int[Tensor, "limbs 2"],
    config: DecoderConfig,
) -> Float[Tensor, " limbs"]:
    """Mean of the field along each limb, less for long ones; 0 where too few samples agree."""
    span = (end - start).float()
    length = span.norm(dim=1).clamp_min(1e-3)
    steps = torch.linspace(0, 1, config.num_samples, device=fields.device)
    pixels = (start[:, None] + steps[:, None] * span[:, None]).round().long().flatten(0, 1)
    x, y = (
        sample_enlarged(
            fields,
            (field + part).repeat_interleave(config.num_samples),
            pixels,
            stride=config.stride,
        ).view(-1, config.num_samples)
        for part in (0, 1)
    )
    direction = span / length[:, None]  # row, column
    samples = x * direction[:, 1:] + y * direction[:, :1]  # limbs, samples
    agrees = (samples > config.min_affinity).sum(1) > config.min_agreement * config.num_samples
    image_height = fields.shape[1] * config.stride
    return (samples.mean(1) + (0.5 * image_height / length - 1).clamp_max(0)) * agrees


@dataclass
class _Person:
    """A person being assembled; `num_parts` also counts replaced joints, as OpenPose does."""

    peaks: dict[int, int]  # joint to index of a peak
    score: float
    num_parts: int


def _assemble(
    joints: Float32[np.ndarray, "peaks 3"], limbs: _Limbs, config: DecoderConfig
) -> Float32[np.ndarray, "people 18 3"]:
    """Join the limbs of one image to people, greedily and limb by limb."""
    people: list[_Person] = []
    for limb, (joint_a, joint_b, _) in enumerate(LIMBS):
        for a, b, score in _best_matches(limbs, limb):
            holders = [p for p in people if p.peaks.get(joint_a) == a or p.peaks.get(joint_b) == b]
            score_with_b = score + float(joints[b, 2])
            if len(holders) > 1 and not holders[0].peaks.keys() & holders[1].peaks.keys():
                first, second = holders[:2]
                first.peaks |= second.peaks
                first.score += second.score + score
                first.num_parts += second.num_parts
                people = [person for person in people if person is not second]
            elif len(holders) > 1 or (holders and holders[0].peaks.get(joint_b) != b):
                holders[0].peaks[joint_b] = b
                holders[0].score += score_with_b
                holders[0].num_parts += 1
            elif not holders and limb < NUM_FOUNDING_LIMBS:
                people.append(
                    _Person({joint_a: a, joint_b: b}, score_with_b + float(joints[a, 2]), 2)
                )
    kept = [
        person.peaks
        for person in people
        if person.num_parts >= config.min_joints
        and person.score >= config.min_mean_score * person.num_parts
    ]
    keypoints = np.full((len(kept), NUM_JOINTS, 3), MISSING_JOINT, dtype=np.float32)
    for row, peaks in enumerate(kept):
        keypoints[row, list(peaks)] = joints[list(peaks.values())]
    return keypoints


def _best_matches(limbs: _Limbs, limb: int) -> Iterator[tuple[int, int, float]]:
    """Candidates of one limb by falling score, each joint used once: start, end, score."""
    first, last = np.searchsorted(limbs.group % len(LIMBS), [limb, limb + 1])
    starts, ends = set[int](), set[int]()
    candidates = (column[first:last].tolist() for column in (limbs.start, limbs.end, limbs.score))
    for start, end, score in zip(*candidates, strict=True):
        if start not in starts and end not in ends:
            starts.add(start)
            ends.add(end)
            yield start, end, score
