"""Images as files: decode anything people have, resize as the authors do, encode JPEG."""

from __future__ import annotations

import io
import warnings
from typing import Literal

import cv2
import numpy as np
import simplejpeg
import torch
from einops import rearrange
from jaxtyping import Float, UInt8
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.nn.functional import interpolate

MAX_PIXELS = 178_956_970  # Pillow's own limit against decompression bombs, twice its warning

Subsampling = Literal["444", "422", "420"]

_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")  # Pillow runs programs for some others
_PHONE_FORMATS = (b"ftyphei", b"ftypmif1", b"ftypavif")

# An EXIF block, if there is one, follows the JFIF header of at most 64 kB.
_EXIF_WINDOW = 1 << 16


class ImageError(ValueError):
    """A file that is no usable image; `reason` is one of a few words that can be counted."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail

    def __reduce__(self) -> tuple[type[ImageError], tuple[str, str]]:
        return type(self), (self.reason, self.detail)


def decode_image(
    data: bytes, *, out: UInt8[np.ndarray, "_ _ 3"] | None = None
) -> UInt8[np.ndarray, "height width 3"]:
    """Decode an encoded image to RGB, upright as its EXIF orientation says.

    It may be JPEG, PNG, WebP, BMP, TIFF or GIF. Greyscale, CMYK, palette and 16-bit images are
    converted, transparency is laid over white, and an animation gives its first frame. A plain JPEG
    bypasses Pillow, and is decoded into the memory of `out` if it has its size.

    Raises:
        ImageError: With reason `empty`, `not_an_image`, `truncated` or `decompression_bomb`.
    """
    if not data:
        raise ImageError("empty", "the file has no bytes")
    if _is_plain_jpeg(data):
        return _decode_plain_jpeg(data, out)
    return _decode_by_pillow(data)


def resize_image(
    image: UInt8[np.ndarray, "height width 3"], size: tuple[int, int]
) -> UInt8[np.ndarray, "{size[0]} {size[1]} 3"]:
    """Resize to (height, width), bicubic with antialiasing, without keeping the aspect ratio.

    Within 2 grey levels of Pillow's bicubic, which the authors use, at about three times its speed.
    """
    if image.shape[:2] == size:
        return image
    # A channels-last view is what torch resizes fastest: no copy to planes is made. torchvision
    # does the same, but importing it takes two seconds, in every worker process.
    pixels = torch.from_numpy(_writeable(image)).unsqueeze(0).permute(0, 3, 1, 2)
    for step in resize_steps(image.shape[:2], size):
        pixels = interpolate(pixels, step, mode="bicubic", antialias=True)
    return np.ascontiguousarray(pixels[0].permute(1, 2, 0).numpy())


def resize_steps(old: tuple[int, ...], new: tuple[int, int]) -> list[tuple[int, int]]:
    """Return the (height, width) to resize to one after the other, to get Pillow's pixels.

    Torch resizes across, then down, and so does Pillow unless an image shrinks more than twice as
    much in height as in width. Rounding to grey levels in between makes the order visible.
    """
    height, width = old
    is_down_first = height - new[0] > max(0, 2 * (width - new[1]))
    return [(new[0], width), new] if is_down_first else [new]


def encode_jpeg(
    image: UInt8[np.ndarray, "height width 3"],
    quality: int = 95,
    subsampling: Subsampling = "420",
) -> bytes:
    """Encode RGB as a baseline JPEG; the same pixels give the same bytes."""
    pixels = np.ascontiguousarray(image)
    return simplejpeg.encode_jpeg(pixels, quality, colorsubsampling=subsampling, fastdct=False)


def encode_png(image: UInt8[np.ndarray, "height width 3"]) -> bytes:
    """Encode RGB as a PNG without loss."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG", compress_level=6)
    return buffer.getvalue()


def encode_drawing(image: UInt8[np.ndarray, "height width 3"]) -> bytes:
    """Encode RGB, flat colours on black, as a PNG whose rows are stored unfiltered.

    On skeletons a quarter smaller and four times as fast as with filters, which break up the long
    runs of one value.
    """
    options = [cv2.IMWRITE_PNG_FILTER, cv2.IMWRITE_PNG_FILTER_NONE, cv2.IMWRITE_PNG_COMPRESSION, 3]
    return cv2.imencode(".png", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), options)[1].tobytes()


def to_floats(images: UInt8[Tensor, "batch height width 3"]) -> Float[Tensor, "batch 3 _ _"]:
    """Return images as the model takes them: channels first, in [-1, 1]."""
    return rearrange(images, "b h w c -> b c h w").to(torch.float32) / 127.5 - 1


def _decode_by_pillow(data: bytes) -> UInt8[np.ndarray, "height width 3"]:
    try:
        with warnings.catch_warnings():
            # Of sizes between its limit and twice that, which is ours, and of damage it can bear.
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
                return np.asarray(_to_rgb(image))
    except UnidentifiedImageError:
        is_phone_format = data[4:].startswith(_PHONE_FORMATS)
        hint = "HEIC or AVIF: convert it to JPEG" if is_phone_format else "no known image format"
        raise ImageError("not_an_image", hint) from None
    except Image.DecompressionBombError as error:
        raise ImageError("decompression_bomb", str(error)) from None
    except Exception as error:  # a damaged header has Pillow raise anything
        raise ImageError("truncated", f"{type(error).__name__}: {error}") from None


def _is_plain_jpeg(data: bytes) -> bool:
    """Whether this is a colour JPEG that needs no conversion and no look at an EXIF rotation."""
    if not data.startswith(b"\xff\xd8") or data.find(b"Exif\0", 0, _EXIF_WINDOW) >= 0:
        return False
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return False
    return colorspace == "YCbCr" and height * width <= MAX_PIXELS


def _decode_plain_jpeg(
    data: bytes, out: UInt8[np.ndarray, "_ _ 3"] | None
) -> UInt8[np.ndarray, "height width 3"]:
    if out is not None and simplejpeg.decode_jpeg_header(data)[:2] != out.shape[:2]:
        out = None
    try:
        return simplejpeg.decode_jpeg(data, "RGB", fastdct=False, fastupsample=False, buffer=out)
    except ValueError as error:
        raise ImageError("truncated", str(error)) from None


def _to_rgb(image: Image.Image) -> Image.Image:
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        # convert() would clip 16-bit grey levels to 255 instead of scaling them.
        image = Image.fromarray((np.asarray(image, np.uint32) >> 8).clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image.convert("RGB")


def _writeable(image: np.ndarray) -> np.ndarray:
    return image if image.flags.writeable else image.copy()
