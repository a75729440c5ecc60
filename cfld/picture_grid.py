"""Pictures side by side: grids with labels, strips, animations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

_FONT_PX = 14
_GAP_PX = 6


@dataclass(frozen=True)
class Tile:
    """A picture of any size, and what is written above it."""

    picture: UInt8[np.ndarray, "height width 3"]
    label: str


def draw_grid(rows: Sequence[Sequence[Tile]], size: tuple[int, int]) -> Image.Image:
    """Lay out rows of labelled pictures on white, all stretched to `size` (height, width).

    Small ones are magnified without smoothing, so that their pixels can be seen. Columns are as
    wide as a picture, or as the widest label.
    """
    height, width = size
    font = ImageFont.load_default(_FONT_PX)
    labels_px = [font.getlength(tile.label) for row in rows for tile in row]
    column_px = max(width, *(int(np.ceil(label_px)) for label_px in labels_px)) + _GAP_PX
    row_px = height + _FONT_PX + 2 * _GAP_PX
    shape = (max(map(len, rows)) * column_px + _GAP_PX, len(rows) * row_px)
    grid = Image.new("RGB", shape, "white")
    pen = ImageDraw.Draw(grid)
    for row, tiles in enumerate(rows):
        for column, tile in enumerate(tiles):
            left, top = column * column_px + _GAP_PX, row * row_px + _GAP_PX
            pen.text((left, top - 3), tile.label, "black", font)
            grid.paste(_stretched(tile.picture, size), (left, top + _FONT_PX + 2))
    return grid


def in_rows(tiles: Sequence[Tile], columns: int) -> list[Sequence[Tile]]:
    """Break tiles into rows."""
    return [tiles[start : start + columns] for start in range(0, len(tiles), columns)]


def join_strip(frames: Sequence[Image.Image]) -> Image.Image:
    """Frames of one size from left to right, without gaps."""
    return Image.fromarray(np.concatenate([np.asarray(frame) for frame in frames], axis=1))


def _stretched(picture: UInt8[np.ndarray, "_ _ 3"], size: tuple[int, int]) -> Image.Image:
    is_magnified = picture.shape[0] < size[0]
    kernel = Image.Resampling.NEAREST if is_magnified else Image.Resampling.BICUBIC
    return Image.fromarray(picture).resize(size[::-1], kernel)
