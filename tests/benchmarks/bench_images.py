"""Decode and resize 750x1101 JPEGs to 512x512, against Pillow's bicubic on the same bytes.

python tests/benchmarks/bench_images.py
"""

import io
import statistics
import sys
import time

import numpy as np
import PIL
import torch
from PIL import Image

from cfld.images import decode_image, encode_jpeg, resize_image

SIZE = (512, 512)
NUM_IMAGES, NUM_ROUNDS = 40, 7


def draw_photos() -> list[bytes]:
    """Textured figures before a plain wall, about 100 kB each, as large as DeepFashion's photos."""
    rows, columns = np.mgrid[:1101, :750]
    figure = ((rows - 600) / 480) ** 2 + ((columns - 375) / 170) ** 2 < 1
    photos = []
    for seed in range(NUM_IMAGES):
        rng = np.random.default_rng(seed)
        coarse = rng.integers(0, 255, (138, 94, 3), dtype=np.uint8)
        texture = np.asarray(Image.fromarray(coarse).resize((750, 1101), Image.Resampling.BICUBIC))
        photo = np.where(figure[..., None], texture + rng.normal(0, 4, texture.shape), 236)
        photos.append(encode_jpeg(photo.clip(0, 255).astype(np.uint8), 95))
    return photos


def with_pillow(data: bytes) -> np.ndarray:
    image = Image.open(io.BytesIO(data)).convert("RGB")
    return np.asarray(image.resize((SIZE[1], SIZE[0]), Image.Resampling.BICUBIC))


def ours(data: bytes) -> np.ndarray:
    return resize_image(decode_image(data), SIZE)


def seconds_for(function, photos: list[bytes]) -> float:
    start = time.perf_counter()
    for data in photos:
        function(data)
    return (time.perf_counter() - start) / len(photos)


def main() -> None:
    photos = draw_photos()
    rounds = [
        (seconds_for(with_pillow, photos), seconds_for(ours, photos)) for _ in range(NUM_ROUNDS)
    ]
    pillow_ms, ours_ms = (statistics.median(column) * 1e3 for column in zip(*rounds, strict=True))
    ratio = statistics.median(pillow / mine for pillow, mine in rounds)
    sys.stdout.write(
        f"{NUM_IMAGES} photos of {sum(map(len, photos)) / NUM_IMAGES / 1e3:.0f} kB, 1 thread, "
        f"Pillow {PIL.__version__}\n"
        f"Pillow bicubic {pillow_ms:.2f} ms, ours {ours_ms:.2f} ms, ratio {ratio:.2f}\n"
    )
    differences = np.stack([np.abs(ours(data).astype(int) - with_pillow(data)) for data in photos])
    sys.stdout.write(
        f"grey levels from Pillow: mean {differences.mean():.4f}, largest {differences.max()}\n"
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
