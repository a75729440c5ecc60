import io
import pickle

import numpy as np
import pytest
from PIL import Image

from cfld import images
from cfld.images import (
    ImageError,
    decode_image,
    encode_drawing,
    encode_jpeg,
    encode_png,
    resize_image,
)
from cfld.pose import draw_skeleton


@pytest.fixture(scope="module")
def photo() -> np.ndarray:
    """A smooth picture with some noise, 110 x 75."""
    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[:110, :75]
    base = np.stack([rows * 2, columns * 3, rows + columns], -1)
    return (base + rng.normal(0, 4, base.shape)).clip(0, 255).astype(np.uint8)


def encoded(image: Image.Image, image_format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def test_plain_jpeg_equals_pillow(photo):
    data = encoded(Image.fromarray(photo), "JPEG", quality=95)
    reference = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    assert np.abs(decode_image(data).astype(int) - reference).max() <= 2


def test_png_round_trip(photo):
    np.testing.assert_array_equal(decode_image(encode_png(photo)), photo)


@pytest.mark.parametrize("size", [(256, 256), (1, 1), (3, 7), (64, 48)])
def test_drawings_come_back_from_all_decoders(size):
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    data = encode_drawing(image)
    with Image.open(io.BytesIO(data)) as opened:
        assert (opened.format, opened.mode) == ("PNG", "RGB")
        np.testing.assert_array_equal(np.asarray(opened), image)
    np.testing.assert_array_equal(decode_image(data), image)


def test_a_skeleton_takes_fewer_bytes_than_by_pillow():
    points = np.random.default_rng(0).uniform(20, 200, (18, 2))
    keypoints = np.concatenate([points, np.ones((18, 1))], axis=1).astype(np.float32)
    skeleton = draw_skeleton(keypoints, (256, 256))
    assert len(encode_drawing(skeleton)) < len(encode_png(skeleton))


def test_greyscale_palette_cmyk_become_rgb(photo):
    image = Image.fromarray(photo)
    grey = decode_image(encoded(image.convert("L"), "PNG"))
    np.testing.assert_array_equal(grey, np.asarray(image.convert("L").convert("RGB")))
    palette = image.convert("P")
    np.testing.assert_array_equal(
        decode_image(encoded(palette, "GIF")), np.asarray(palette.convert("RGB"))
    )
    cmyk = decode_image(encoded(image.convert("CMYK"), "JPEG", quality=100, subsampling=0))
    assert np.abs(cmyk.astype(int) - photo).mean() < 3


def test_sixteen_bit_grey_is_scaled_not_clipped(photo):
    grey = photo[..., 0].astype(np.uint16) * 257
    decoded = decode_image(encoded(Image.fromarray(grey), "PNG"))
    np.testing.assert_array_equal(decoded[..., 1], photo[..., 0])


def test_transparency_is_laid_over_white():
    image = Image.new("RGBA", (4, 2), (255, 0, 0, 0))
    image.putpixel((0, 0), (10, 20, 30, 255))
    decoded = decode_image(encoded(image, "PNG"))
    assert tuple(decoded[0, 0]) == (10, 20, 30)
    assert tuple(decoded[1, 3]) == (255, 255, 255)


def test_exif_rotation_is_applied(photo):
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(Image.fromarray(photo), "JPEG", quality=95, exif=exif)
    assert decode_image(data).shape == (75, 110, 3)
    upright = np.asarray(Image.fromarray(photo).rotate(-90, expand=True)).astype(int)
    assert np.abs(decode_image(data) - upright).mean() < 4


def test_animation_gives_its_first_frame():
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert tuple(decode_image(data)[0, 0]) == (255, 0, 0)


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "GIF", "WEBP"])
def test_truncated_file(photo, image_format):
    data = encoded(Image.fromarray(photo), image_format)
    with pytest.raises(ImageError, match="truncated"):
        decode_image(data[: len(data) // 2])


def test_empty_and_foreign_files():
    with pytest.raises(ImageError, match="empty: the file has no bytes"):
        decode_image(b"")
    with pytest.raises(ImageError, match="not_an_image: no known image format"):
        decode_image(b"name,person\n1,2\n")


def test_a_phones_own_format_comes_with_a_hint():
    header = b"\0\0\0\x1cftypheic\0\0\0\0mif1heic"
    with pytest.raises(ImageError, match="not_an_image: HEIC or AVIF: convert it to JPEG"):
        decode_image(header + bytes(200))


def test_a_format_that_pillow_hands_to_programs_is_no_image():
    postscript = encoded(Image.new("RGB", (4, 4)), "EPS")
    with pytest.raises(ImageError, match="not_an_image: no known image format"):
        decode_image(postscript)


@pytest.mark.parametrize(
    ("image_format", "options"),
    [
        ("JPEG", {"exif": True}), ("JPEG", {}), ("PNG", {"exif": True}), ("WEBP", {"exif": True}),
        ("TIFF", {"compression": "tiff_lzw"}), ("GIF", {}), ("BMP", {}),
    ],
)  # fmt: skip
def test_damaged_files_give_an_image_or_an_image_error(photo, image_format, options):
    if "exif" in options:
        exif = Image.Exif()
        exif[0x0112], exif[0x010F], exif[0x8769] = 6, "Maker", {0x9003: "2020"}
        options = {"exif": exif}
    whole = encoded(Image.fromarray(photo[:40, :30]), image_format, **options)
    rng = np.random.default_rng(0)
    for _ in range(400):
        data = bytearray(whole)
        for place in rng.integers(min(len(data), 400), size=rng.integers(1, 4)):
            data[place] = rng.choice([0, 255, rng.integers(256)])
        try:
            image = decode_image(bytes(data))
        except ImageError:
            continue
        assert (image.dtype, image.shape[2:]) == (np.uint8, (3,))


def test_decompression_bomb_is_refused_before_it_is_decoded():
    with pytest.raises(ImageError, match="decompression_bomb"):
        decode_image(encoded(Image.new("1", (20_000, 20_000)), "PNG"))


def test_image_error_survives_a_process_boundary():
    error = pickle.loads(pickle.dumps(ImageError("truncated", "byte 7")))
    assert (error.reason, error.detail) == ("truncated", "byte 7")


@pytest.mark.parametrize(("size", "is_down_first"), [((1101, 750), True), ((700, 750), False)])
def test_resize_stays_within_two_levels_of_pillow(size, is_down_first):
    rng = np.random.default_rng(1)
    coarse = Image.fromarray(rng.integers(0, 255, (40, 28, 3), dtype=np.uint8))
    photo = np.asarray(coarse.resize((750, 1101), Image.Resampling.BICUBIC))
    noisy = (photo + rng.normal(0, 20, photo.shape)).clip(0, 255).astype(np.uint8)
    photo = np.ascontiguousarray(noisy[: size[0], : size[1]])
    reference = Image.fromarray(photo)
    if is_down_first:  # as Pillow does by itself since version 13
        reference = reference.resize((photo.shape[1], 512), Image.Resampling.BICUBIC)
    reference = np.asarray(reference.resize((512, 512), Image.Resampling.BICUBIC))
    difference = np.abs(resize_image(photo, (512, 512)).astype(int) - reference)
    assert difference.max() <= 2
    assert difference.mean() <= 0.05


def test_resize_to_its_own_size_changes_nothing(photo):
    assert resize_image(photo, (110, 75)) is photo


def test_jpeg_is_the_same_bytes_each_time_and_keeps_colour(photo):
    assert encode_jpeg(photo) == encode_jpeg(photo.copy())
    fine = decode_image(encode_jpeg(photo, 95, "444")).astype(int)
    coarse = decode_image(encode_jpeg(photo, 95, "420")).astype(int)
    assert np.abs(fine - photo).mean() < np.abs(coarse - photo).mean() < 4


def test_size_limit_is_pillows_own():
    assert images.MAX_PIXELS == Image.MAX_IMAGE_PIXELS * 2


def test_jpeg_is_decoded_into_memory_of_its_size() -> None:
    image = np.random.default_rng(0).integers(0, 255, (40, 24, 3), dtype=np.uint8)
    data = encode_jpeg(image)
    memory, other = np.zeros_like(image), np.zeros((24, 40, 3), np.uint8)
    assert np.shares_memory(decode_image(data, out=memory), memory)
    np.testing.assert_array_equal(memory, decode_image(data))
    np.testing.assert_array_equal(decode_image(data, out=other), memory)
    np.testing.assert_array_equal(decode_image(encode_png(image), out=memory), image)
    assert not other.any()
