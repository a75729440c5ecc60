"""Peaks of enlarged, smoothed heatmaps, computed only in the blocks that can hold one.

Enlarging by the network's stride (OpenCV's Lanczos) and smoothing (Gaussian) are linear along each
axis, so the pixels of a block are two small matrix products of the few cells around it. The same
matrices bound what a block can reach: almost all blocks drop out before any pixel is computed.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import cv2
import numpy as np
import torch
from jaxtyping import Float, Float32, Int
from scipy.ndimage import gaussian_filter1d
from torch import Tensor

_LANCZOS_TAPS = 8
_NEGLIGIBLE_WEIGHT = 1e-6
_BLOCKS_AT_ONCE = 1 << 15


class Peaks(NamedTuple):
    """Peaks of several maps, ordered by map, row and column."""

    which: Int[Tensor, " peaks"]
    """The map that a peak is in."""
    pixels: Int[Tensor, "peaks 2"]
    """Row and column of the largest pixel."""
    points: Float[Tensor, "peaks 2"]
    """The same refined to fractions of a pixel, as x, y."""
    scores: Float[Tensor, " peaks"]
    """Values of the enlarged map at `pixels`, before smoothing."""


def find_peaks(
    maps: Float[Tensor, "maps height width"], *, stride: int, sigma_px: float, min_peak: float
) -> Peaks:
    """Find pixels of the enlarged, smoothed maps that exceed `min_peak` and their four neighbours.

    Cell i of a map covers the pixels from stride·i on. Of two equal neighbours the lower or right
    one is the peak. What lies outside of a map counts as zero.
    """
    rows, columns = (
        _Smoothing(*(table.to(maps.device) for table in _smoothing(num_cells, stride, sigma_px)))
        for num_cells in maps.shape[1:]
    )
    reach = rows.bound @ maps.abs() @ columns.bound.T  # maps, height, width
    parts = [
        _peaks_of_blocks(maps, blocks, rows, columns, stride, min_peak)
        for blocks in (reach > min_peak).nonzero().split(_BLOCKS_AT_ONCE)
    ]
    which, pixels, offsets = (torch.cat(column) for column in zip(*parts, strict=True))
    height, width = (stride * num_cells for num_cells in maps.shape[1:])
    order = torch.argsort((which * height + pixels[:, 0]) * width + pixels[:, 1])
    which, pixels, offsets = which[order], pixels[order], offsets[order]
    return Peaks(
        which,
        pixels,
        points=pixels.flip(1) + offsets,
        scores=sample_enlarged(maps, which, pixels, stride=stride),
    )


def sample_enlarged(
    maps: Float[Tensor, "maps height width"],
    which: Int[Tensor, " points"],
    pixels: Int[Tensor, "points 2"],
    *,
    stride: int,
) -> Float[Tensor, " points"]:
    """Values of enlarged maps at pixels (row, column), without enlarging the maps."""
    (y_cells, y_weights), (x_cells, x_weights) = (
        tuple(table.to(maps.device)[pixels[:, axis]] for table in _taps(num_cells, stride))
        for axis, num_cells in enumerate(maps.shape[1:])
    )
    values = maps[which[:, None, None], y_cells[:, :, None], x_cells[:, None]]  # points, taps, taps
    return torch.einsum("pyx,py,px->p", values, y_weights, x_weights)


class _Smoothing(NamedTuple):
    """Enlargement and Gaussian along one axis, as small matrices per block of `stride` pixels."""

    bound: Float[Tensor, "blocks cells"]  # largest absolute weight of each cell in each block
    cells: Int[Tensor, "blocks window"]  # the cells a block depends on
    weights: Float[Tensor, "blocks pixels window"]  # one pixel more on either side of the block


@lru_cache(maxsize=64)
def _smoothing(num_cells: int, stride: int, sigma_px: float) -> _Smoothing:
    matrix = gaussian_filter1d(_enlargement(num_cells, stride), sigma_px, axis=0)
    blocks = np.abs(matrix).reshape(num_cells, stride, num_cells)
    padded = np.pad(matrix, ((1, 1), (0, 0)))
    weights = np.stack([padded[stride * i : stride * (i + 1) + 2] for i in range(num_cells)])
    is_used = np.abs(weights).max(axis=1) > _NEGLIGIBLE_WEIGHT
    cells = _windows(is_used.argmax(axis=1), int(is_used.sum(axis=1).max()), num_cells)
    return _Smoothing(
        bound=torch.from_numpy(blocks.max(axis=1)),
        cells=torch.from_numpy(cells),
        weights=torch.from_numpy(np.take_along_axis(weights, cells[:, None], axis=2)),
    )


@lru_cache(maxsize=64)
def _taps(
    num_cells: int, stride: int
) -> tuple[Int[Tensor, "pixels taps"], Float[Tensor, "pixels taps"]]:
    """Cells and weights that make up each pixel of an enlarged axis."""
    matrix = _enlargement(num_cells, stride)
    cells = _windows((matrix != 0).argmax(axis=1), min(_LANCZOS_TAPS, num_cells), num_cells)
    return torch.from_numpy(cells), torch.from_numpy(np.take_along_axis(matrix, cells, axis=1))


def _enlargement(num_cells: int, stride: int) -> Float32[np.ndarray, "pixels cells"]:
    """OpenCV's Lanczos enlargement along one axis, as a matrix."""
    identity = np.eye(num_cells, dtype=np.float32)
    size = (num_cells, num_cells * stride)  # (width, height)
    matrix = cv2.resize(identity, size, interpolation=cv2.INTER_LANCZOS4)
    return np.where(np.abs(matrix) < _NEGLIGIBLE_WEIGHT, np.float32(0), matrix)  # rounding noise


def _windows(
    starts: Int[np.ndarray, " rows"], window: int, num_cells: int
) -> Int[np.ndarray, "rows window"]:
    return np.minimum(starts, num_cells - window)[:, None] + np.arange(window)


def _peaks_of_blocks(
    maps: Float[Tensor, "maps height width"],
    blocks: Int[Tensor, "blocks 3"],
    rows: _Smoothing,
    columns: _Smoothing,
    stride: int,
    min_peak: float,
) -> tuple[Int[Tensor, " peaks"], Int[Tensor, "peaks 2"], Float[Tensor, "peaks 2"]]:
    """Peaks in blocks (map, block row, block column): map, pixel, and the refinement of x, y."""
    which, row, column = blocks.unbind(1)
    cells = maps[which[:, None, None], rows.cells[row][:, :, None], columns.cells[column][:, None]]
    values = (
        rows.weights[row] @ cells @ columns.weights[column].mT
    )  # blocks, stride + 2, stride + 2
    centre = values[:, 1:-1, 1:-1]
    up, down = values[:, :-2, 1:-1], values[:, 2:, 1:-1]
    left, right = values[:, 1:-1, :-2], values[:, 1:-1, 2:]
    is_peak = (centre > min_peak) & (centre >= up) & (centre >= left)
    is_peak &= (centre > down) & (centre > right)
    block, y, x = is_peak.nonzero().unbind(1)
    pixels = stride * blocks[block, 1:] + torch.stack((y, x), dim=1)
    centre, up, down, left, right = (v[block, y, x] for v in (centre, up, down, left, right))
    last = torch.tensor(maps.shape[1:], device=maps.device) * stride - 1
    has_neighbours = (pixels > 0) & (pixels < last)
    offset_y = _vertex(centre, up, down) * has_neighbours[:, 0]
    offset_x = _vertex(centre, left, right) * has_neighbours[:, 1]
    return which[block], pixels, torch.stack((offset_x, offset_y), dim=1)


def _vertex(
    centre: Float[Tensor, " peaks"], before: Float[Tensor, " peaks"], after: Float[Tensor, " peaks"]
) -> Float[Tensor, " peaks"]:
    """Where the parabola through three neighbouring values has its vertex, in [-0.5, 0.5]."""
    curvature = (2 * centre - before - after).clamp_min(1e-12)
    return (0.5 * (after - before) / curvature).clamp(-0.5, 0.5)
