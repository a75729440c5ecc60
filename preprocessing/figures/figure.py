"""Draws one person in one pose, with exact keypoints and what each pixel shows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Float32, UInt8

from preprocessing.figures.body import PosedBody, sample_body, sample_pose, view_of
from preprocessing.figures.clothes import BACKGROUND, Outfit, Region, paint, sample_outfit
from preprocessing.figures.shapes import body_solids, hair_solids, skirt_solids
from preprocessing.figures.solids import Solid, cast_rays

SILHOUETTE_LEVELS = 50
"""A pixel belongs to the figure where a channel differs from the background by more than this."""


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One picture of one drawn person.

    `keypoints` are exact, also for joints that something hides; missing (NaN, NaN, 0) are joints
    outside the picture and points of the face that look away. A coordinate of 0 is the picture's
    edge, 0.5 the middle of its first pixel. `regions` holds a `Region` per pixel.
    """

    image: UInt8[np.ndarray, "height width 3"]
    keypoints: Float32[np.ndarray, "18 3"]
    regions: UInt8[np.ndarray, "height width"]
    view: str


@dataclass(frozen=True)
class Camera:
    """Orthographic: `scale` pixels per body height, the middle of the hips at `origin` (x, y)."""

    scale: float
    origin: tuple[float, float]


def draw_figure(person: int, image: int, *, size: tuple[int, int], seed: int) -> Figure:
    """Draw picture number `image` of a person.

    Appearance depends on (seed, person) alone, pose and camera come from another random stream, so
    that neither tells anything about the other. The drawing does not depend on what was drawn
    before; two sizes of one shape show the same picture.
    """
    posed, outfit, camera = _pose_person(person, image, size=size, seed=seed)
    samples = 3 if max(size) <= 128 else 2
    height, width = size
    step = 1 / (samples * camera.scale)
    surface = cast_rays(
        _solids(posed, outfit),
        (np.arange(width * samples) + 0.5) * step - camera.origin[0] / camera.scale,
        (np.arange(height * samples) + 0.5) * step - camera.origin[1] / camera.scale,
    )
    colours, regions = paint(surface, posed.body, outfit)
    return Figure(
        image=_average(colours, samples),
        keypoints=_project(posed, camera, size),
        regions=_majority(regions, samples),
        view=view_of(posed.pose),
    )


def pose_figure(
    person: int, image: int, *, size: tuple[int, int], seed: int
) -> tuple[Float32[np.ndarray, "18 3"], str]:
    """The keypoints and the view of a picture, without drawing it."""
    posed, _, camera = _pose_person(person, image, size=size, seed=seed)
    return _project(posed, camera, size), view_of(posed.pose)


def find_silhouette(
    image: UInt8[np.ndarray, "height width 3"],
) -> Bool[np.ndarray, "height width"]:
    """Where a picture, drawn or generated, differs from the plain background."""
    difference = np.abs(image.astype(np.int16) - BACKGROUND).max(axis=2)
    return difference > SILHOUETTE_LEVELS


def _pose_person(
    person: int, image: int, *, size: tuple[int, int], seed: int
) -> tuple[PosedBody, Outfit, Camera]:
    appearance = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(0, person)))
    placement = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(1, person, image)))
    outfit, body = sample_outfit(appearance), sample_body(appearance)
    posed = PosedBody(body, sample_pose(placement))
    return posed, outfit, _sample_camera(placement, posed, size)


def _sample_camera(
    generator: np.random.Generator, posed: PosedBody, size: tuple[int, int]
) -> Camera:
    """Frame the whole figure, at a random size and place, or now and then its upper part."""
    height, width = size
    fill, zoom, across, down = generator.uniform((0.95, 1.25, 0, 0), (1.15, 1.6, 1, 1))
    is_close = generator.uniform() < 0.2
    points = np.concatenate([posed.joints, posed.skull[None] - [0, posed.body.head, 0]])[:, :2]
    low, high = np.nanmin(points, axis=0) - 0.04, np.nanmax(points, axis=0) + 0.06
    scale = fill * height
    if is_close:
        scale *= zoom
        x = (0.42 + 0.16 * across) * width - scale * posed.neck[0] / 2
        return Camera(scale, (x, (0.02 + 0.06 * down) * height - scale * low[1]))
    extent = high - low
    scale = min(scale, height / extent[1], max(width / extent[0], 0.75 * scale))
    spare = np.array([width, height]) - scale * extent
    x, y = np.where(spare > 0, (0.35 + 0.3 * np.array([across, down])) * spare, spare / 2)
    return Camera(scale, (x - scale * low[0], y - scale * low[1]))


def _solids(posed: PosedBody, outfit: Outfit) -> list[Solid]:
    solids = body_solids(posed) + hair_solids(posed, outfit.hair_style)
    if outfit.has_skirt:
        length = outfit.leg * (posed.body.thigh + posed.body.shin)
        solids += skirt_solids(posed, length, outfit.flare)
    return solids


def _project(
    posed: PosedBody, camera: Camera, size: tuple[int, int]
) -> Float32[np.ndarray, "18 3"]:
    points = posed.joints[:, :2] * camera.scale + camera.origin
    height, width = size
    is_inside = ((points >= 0) & (points < (width, height))).all(axis=1)  # False for NaN
    keypoints = np.concatenate([points, np.ones((len(points), 1))], axis=1)
    keypoints[~is_inside] = np.nan, np.nan, 0
    return keypoints.astype(np.float32)


def _average(
    colours: Float[np.ndarray, "rows columns 3"], samples: int
) -> UInt8[np.ndarray, "height width 3"]:
    total = sum(colours[y::samples, x::samples] for y in range(samples) for x in range(samples))
    return np.round(total * (255 / samples**2)).astype(np.uint8)


def _majority(
    regions: UInt8[np.ndarray, "rows columns"], samples: int
) -> UInt8[np.ndarray, "height width"]:
    height, width = (length // samples for length in regions.shape)
    votes = np.zeros((len(Region), height, width), np.uint8)
    for y in range(samples):
        for x in range(samples):
            votes += regions[y::samples, x::samples] == np.arange(len(Region))[:, None, None]
    return votes.argmax(axis=0).astype(np.uint8)
