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


def draw_grid(rows: Sequence[Sequence[Tile]], *, height: int = 192) -> Image.Image:
    """Lay out rows of labelled pictures on white, each resized to `height` pixels.

    Small ones are magnified without smoothing, so that their pixels can be seen. Columns are as
    wide as their widest picture or label.
    """
    font = ImageFont.load_default(_FONT_PX)
    pictures = [[_of_height(tile.picture, height) for tile in row] for row in rows]
    columns = max(map(len, rows))
    widths = [0] * columns
    for row, tiles in zip(pictures, rows, strict=True):
        for column, (picture, tile) in enumerate(zip(row, tiles, strict=True)):
            label_px = int(np.ceil(font.getlength(tile.label)))
            widths[column] = max(widths[column], picture.width, label_px)
    row_px = height + _FONT_PX + 2 * _GAP_PX
    grid = Image.new("RGB", (sum(widths) + _GAP_PX * (columns + 1), row_px * len(rows)), "white")
    pen = ImageDraw.Draw(grid)
    for number, (row, tiles) in enumerate(zip(pictures, rows, strict=True)):
        top, left = number * row_px + _GAP_PX, _GAP_PX
        for width, picture, tile in zip(widths, row, tiles, strict=False):
            pen.text((left, top - 2), tile.label, "black", font)
            grid.paste(picture, (left, top + _FONT_PX + 2))
            left += width + _GAP_PX
    return grid


def in_rows(tiles: Sequence[Tile], columns: int) -> list[Sequence[Tile]]:
    """Break tiles into rows."""
    return [tiles[start : start + columns] for start in range(0, len(tiles), columns)]


def join_strip(frames: Sequence[Image.Image]) -> Image.Image:
    """Frames of one size from left to right, without gaps."""
    width, height = frames[0].size
    strip = Image.new("RGB", (width * len(frames), height))
    for place, frame in enumerate(frames):
        strip.paste(frame, (place * width, 0))
    return strip


def _of_height(picture: UInt8[np.ndarray, "_ _ 3"], height: int) -> Image.Image:
    width = max(1, round(picture.shape[1] * height / picture.shape[0]))
    is_magnified = picture.shape[0] < height
    kernel = Image.Resampling.NEAREST if is_magnified else Image.Resampling.BICUBIC
    return Image.fromarray(picture).resize((width, height), kernel)
