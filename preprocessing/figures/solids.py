"""Ray-cast ellipsoids and tapered tubes into a buffer of body part, angle, height and light."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from jaxtyping import Float, UInt8

LEFT, DOWN, FRONT = range(3)
"""Rows of a frame: a body part's own axes in camera coordinates (x right, y down, z to the viewer).

The identity is a person who faces the viewer: its left is the image's right.
"""

LIGHT = np.array([-0.28, -0.5, 0.82])


class Part(IntEnum):
    """A chart of the body's surface; left and right limbs share one."""

    NONE = 0
    TORSO = 1
    NECK = 2
    HEAD = 3
    HAIR = 4
    ARM = 5
    LEG = 6
    SKIRT = 7
    SHOE = 8


@dataclass(frozen=True, kw_only=True)
class Solid:
    """An ellipsoid round `centre`, or, with a `taper`, a tube of elliptical section below it.

    Lengths are in body heights. `radii` belong to the rows of `frame`; a tube's second radius is
    its length, and `taper` is the ratio of its end radii to its start radii. `height` is the
    distance down the part at `centre`.
    """

    part: Part
    centre: Float[np.ndarray, " xyz"]
    frame: Float[np.ndarray, "3 3"]
    radii: tuple[float, float, float]
    height: float = 0.0
    taper: float | None = None

    @property
    def bounds(self) -> Float[np.ndarray, "2 2"]:
        """Lowest and highest (x, y) of the solid as the camera sees it."""
        axes = (self.frame * np.array(self.radii)[:, None])[:, :2]
        if self.taper is None:
            reach = np.sqrt((axes**2).sum(axis=0))
            return self.centre[:2] + np.stack([-reach, reach])
        reach = np.sqrt((axes[[LEFT, FRONT]] ** 2).sum(axis=0))
        start, end = self.centre[:2], self.centre[:2] + axes[DOWN]
        low = np.minimum(start - reach, end - self.taper * reach)
        return np.stack([low, np.maximum(start + reach, end + self.taper * reach)])


@dataclass(frozen=True)
class SurfaceBuffer:
    """What each ray meets first; all zero where it meets nothing.

    `angle` runs round the part from -pi to pi, 0 at its front and positive to the person's left;
    `height` runs down it, in body heights; `light` is the cosine to the lamp.
    """

    part: UInt8[np.ndarray, "height width"]
    angle: Float[np.ndarray, "height width"]
    height: Float[np.ndarray, "height width"]
    light: Float[np.ndarray, "height width"]


def cast_rays(
    solids: Sequence[Solid], xs: Float[np.ndarray, " width"], ys: Float[np.ndarray, " height"]
) -> SurfaceBuffer:
    """Cast one ray straight into the scene at every (x, y); the nearest surface wins."""
    shape = (len(ys), len(xs))
    depth = np.full(shape, -np.inf, np.float32)
    buffer = SurfaceBuffer(
        np.zeros(shape, np.uint8), *(np.zeros(shape, np.float32) for _ in range(3))
    )
    for solid in solids:
        (left, top), (right, bottom) = solid.bounds
        columns = slice(*np.searchsorted(xs, [left, right]))
        rows = slice(*np.searchsorted(ys, [top, bottom]))
        window = SurfaceBuffer(
            *(getattr(buffer, name)[rows, columns] for name in ("part", "angle", "height", "light"))
        )
        _cast_solid(solid, xs[columns], ys[rows], depth[rows, columns], window)
    return buffer


def _cast_solid(
    solid: Solid,
    xs: Float[np.ndarray, " width"],
    ys: Float[np.ndarray, " height"],
    depth: Float[np.ndarray, "height width"],
    buffer: SurfaceBuffer,
) -> None:
    """Write the solid's visible points into views of the buffers.

    A point P = (x, y, z) from the centre lies on the surface where |M P|^2 = (1 + s.P)^2: M scales
    the axes to radius 1 (a tube's own axis to 0) and s is the tube's change of radius per length.
    That is A z^2 + 2 B z + C = 0 with A fixed, B linear and C quadratic in x and y.
    """
    is_tube = solid.taper is not None
    inverse_radii = 1 / np.array(solid.radii)
    slope = np.zeros(3)
    if solid.taper is not None:
        slope = solid.frame[DOWN] * (solid.taper - 1) * inverse_radii[DOWN]
        inverse_radii[DOWN] = 0
    unit_from_point = solid.frame * inverse_radii[:, None]
    quadric = unit_from_point.T @ unit_from_point - np.outer(slope, slope)
    a = max(quadric[2, 2], 1e-3)
    x = (xs - solid.centre[0]).astype(np.float32)[None, :]
    y = (ys - solid.centre[1]).astype(np.float32)[:, None]
    b = np.float32(quadric[2, 0]) * x + (quadric[2, 1] * y - slope[2]).astype(np.float32)
    c = (
        (quadric[0, 0] * x * x - 2 * slope[0] * x - 1).astype(np.float32)
        + (quadric[1, 1] * y * y - 2 * slope[1] * y).astype(np.float32)
        + x * (2 * quadric[0, 1] * y).astype(np.float32)
    )
    root = b * b - np.float32(a) * c
    row, column = np.nonzero(root > 0)
    z = (np.sqrt(root[row, column]) - b[row, column]) / np.float32(a)
    is_seen = z + np.float32(solid.centre[2]) > depth[row, column]
    if is_tube:
        axis = solid.frame[DOWN].astype(np.float32)
        along = axis[0] * x[0, column] + axis[1] * y[row, 0] + axis[2] * z
        is_seen &= (along >= 0) & (along <= solid.radii[DOWN])
    row, column, z = row[is_seen], column[is_seen], z[is_seen]

    # einsum and not a matrix product: BLAS results may change with its number of threads.
    point = np.stack([x[0, column], y[row, 0], z])  # [3, points]
    unit = np.einsum("ij,jn->in", unit_from_point.astype(np.float32), point)
    normal = np.einsum("ij,in->jn", unit_from_point.astype(np.float32), unit)
    depth[row, column] = z + np.float32(solid.centre[2])
    buffer.part[row, column] = solid.part
    buffer.angle[row, column] = np.arctan2(unit[LEFT], unit[FRONT])
    buffer.height[row, column] = solid.height + np.einsum(
        "j,jn->n", solid.frame[DOWN].astype(np.float32), point
    )
    lit = np.einsum("j,jn->n", LIGHT.astype(np.float32), normal)
    buffer.light[row, column] = lit / np.sqrt(np.einsum("jn,jn->n", normal, normal))
