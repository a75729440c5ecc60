"""Scores per second against per-image calls of scikit-image, and memory over many images.

The baseline is what the authors' evaluation does on a CPU: Pillow decodes and resizes a pair, then
scikit-image computes PSNR and each SSIM of that one image.

    python tests/benchmarks/bench_metrics.py
"""

import argparse
import multiprocessing
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import nn

from cfld.evaluation.metric_networks import FEATURE_DIM, MetricNetworks
from cfld.evaluation.photo_source import open_photos
from cfld.evaluation.result_files import find_results
from cfld.evaluation.result_reader import ResultReader
from cfld.evaluation.scoring import ImagePair, map_ahead, score
from cfld.metrics import pair_metrics

SIZE = (256, 176)
GAUSSIAN = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}


def scikit_image_scores(generated: np.ndarray, target: np.ndarray) -> tuple[float, ...]:
    """The protocol's calls for one image [3, height, width] in [0, 1]."""
    x, y = generated * 255, target * 255
    data_range = x.max() - x.min()
    return (
        peak_signal_noise_ratio(target, generated, data_range=1),
        structural_similarity(target, generated, data_range=1, win_size=51, channel_axis=0),
        structural_similarity(y, x, channel_axis=0, data_range=data_range, **GAUSSIAN),
        structural_similarity(target, generated, channel_axis=0, data_range=1, **GAUSSIAN),
    )


def as_planes(image: Image.Image) -> np.ndarray:
    return np.asarray(image, np.float32).transpose(2, 0, 1) / 255


def compare(name: str, num: int, ours: Callable[[], object], theirs: Callable[[], object]) -> None:
    """Print both rates from interleaved repeats, and the ratio of what they cost in CPU time."""
    clocks = (time.perf_counter, time.process_time)
    ratios: list[tuple[float, float]] = []
    rates: list[tuple[float, float]] = []
    for _ in range(7):
        spent = []
        for work in (ours, theirs):
            start = [clock() for clock in clocks]
            work()
            spent.append([clock() - since for clock, since in zip(clocks, start, strict=True)])
        ratios.append((spent[1][0] / spent[0][0], spent[1][1] / spent[0][1]))
        rates.append((num / spent[0][0], num / spent[1][0]))
    wall, cpu = (statistics.median(each) for each in zip(*ratios, strict=True))
    lowest, highest = min(ratios)[0], max(ratios)[0]
    our_rate, their_rate = (statistics.median(each) for each in zip(*rates, strict=True))
    sys.stdout.write(
        f"{name}: {our_rate:.0f} images/s, per-image calls {their_rate:.0f} images/s, ratio "
        f"{wall:.1f} ({lowest:.1f} to {highest:.1f}); of CPU time {cpu:.1f}\n"
    )


def make_folders(root: Path, num_photos: int) -> None:
    """Photos of 1101x750 and a result for every ordered pair of neighbours three apart."""
    generator = np.random.default_rng(0)
    for folder in ("photos", "results"):
        (root / folder).mkdir()
    for i in range(num_photos):
        coarse = Image.fromarray(generator.integers(0, 256, (24, 16, 3), dtype=np.uint8))
        coarse.resize((750, 1101), Image.Resampling.BICUBIC).save(
            root / "photos" / f"p{i}.jpg", quality=95
        )
        small = coarse.resize((SIZE[1], SIZE[0]), Image.Resampling.BICUBIC)
        for step in (1, 2, 3):
            small.save(root / "results" / f"p{(i + step) % num_photos}_2_p{i}.png")


def bench_functions(num_images: int) -> None:
    pixels = torch.randint(0, 256, (2, num_images, *SIZE, 3), dtype=torch.uint8)
    generated, target = pixels.permute(0, 1, 4, 2, 3).float() / 255  # as scoring stacks images
    pairs = [
        (x.numpy(), y.numpy())
        for x, y in zip(generated.contiguous(), target.contiguous(), strict=True)
    ]
    compare(
        "PSNR and three SSIMs of arrays at 256x176",
        num_images,
        lambda: pair_metrics(generated, target),
        lambda: [scikit_image_scores(*pair) for pair in pairs],
    )


def bench_folders(num_photos: int) -> None:
    networks = MetricNetworks(lpips=None, inceptions={}, missing={}, device=torch.device("cpu"))
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        make_folders(root, num_photos)

        def ours() -> None:
            targets = open_photos(str(root / "photos"))
            results = find_results(root / "results", targets)
            reader = ResultReader(files=results.files, photos=targets, size=SIZE)
            score(reader.read_all(), networks)

        def theirs() -> None:
            for path in sorted((root / "results").iterdir()):
                photo = Image.open(root / "photos" / f"{path.stem.split('_2_')[1]}.jpg")
                target = photo.resize((SIZE[1], SIZE[0]), Image.Resampling.BICUBIC)
                scikit_image_scores(as_planes(Image.open(path)), as_planes(target))

        compare("whole folders, decoding included", 3 * num_photos, ours, theirs)


class Features(nn.Module):
    """Stands for Inception: the same number of features in no time."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1)[:, :FEATURE_DIM]


def peak_memory(num_images: int) -> float:
    """Score so many images and return the process's highest resident memory in MiB."""
    torch.set_num_threads(1)
    networks = MetricNetworks(
        lpips=None, inceptions={"fid": Features()}, missing={}, device=torch.device("cpu")
    )

    def pair(i: int) -> ImagePair:
        pixels = np.random.default_rng(i).integers(0, 256, (2, 128, 64, 3), dtype=np.uint8)
        return ImagePair(f"image_{i}", *pixels)

    def pairs() -> Iterator[ImagePair]:
        yield from map_ahead(pair, range(num_images))

    score(pairs(), networks)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def bench_memory() -> None:
    context = multiprocessing.get_context("spawn")
    for num_images in (1000, 10_000):
        with context.Pool(1) as pool:
            peak = pool.apply(peak_memory, (num_images,))
        sys.stdout.write(f"{num_images} images of 128x64: peak memory {peak:.0f} MiB\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num-images", type=int, default=64)
    args = parser.parse_args()
    bench_functions(args.num_images)
    bench_folders(args.num_images // 2)
    bench_memory()
