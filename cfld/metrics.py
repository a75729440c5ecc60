"""Scores of one generated image against its target: PSNR and three kinds of SSIM, in batches.

Images are RGB in [0, 1]. The SSIMs differ in window, covariance and data range, hence the names:

| name | values | window | covariance | data range | used by |
|---|---|---|---|---|---|
| `psnr` | dB, infinite for equal images | | | 1 | all |
| `ssim_paper` | [-1, 1] | uniform, 51 | sample | 1 | CFLD's tables (NTED's protocol) |
| `ssim_256` | [-1, 1] | Gaussian, sigma 1.5 | population | generated max - min | PATN's heirs |
| `ssim` | [-1, 1] | Gaussian, sigma 1.5 | population | 1 | Wang et al. 2004: the usual one |

So `ssim_256` judges a dull image more severely than `ssim`; of a single colour it is NaN.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

Images = Float[Tensor, "batch 3 height width"]
PerImage = Float[Tensor, " batch"]

PAIR_METRICS = ("psnr", "ssim_paper", "ssim_256", "ssim")

_UNIFORM = np.full(51, 1 / 51)
# scikit-image cuts a Gaussian of sigma 1.5 at 3.5 sigma, which is 11 taps.
_GAUSSIAN = np.exp(-0.5 * (np.arange(-5, 6) / 1.5) ** 2)
_GAUSSIAN /= _GAUSSIAN.sum()
_TO_SAMPLE_COVARIANCE = 51**2 / (51**2 - 1)


def pair_metrics(
    generated: Images, target: Images, names: Collection[str] = PAIR_METRICS
) -> dict[str, PerImage]:
    """Compute several of `PAIR_METRICS` at once, sharing what they have in common.

    On a CPU each image is worked on alone, in a core's cache, on all cores at once; on another
    device the whole batch is.

    Raises:
        ValueError: If a name is unknown, or the images are smaller than a window.
    """
    if unknown := sorted(set(names).difference(PAIR_METRICS)):
        raise ValueError(f"unknown metric {unknown}; there are {list(PAIR_METRICS)}")
    check_windows((generated.shape[-2], generated.shape[-1]), names)
    generated, target = generated.float(), target.float()
    if generated.device.type != "cpu":
        scores = _scores(generated, target, names, _ON_DEVICE)
        return {name: scores[name] for name in names}

    def work(pair: tuple[np.ndarray, np.ndarray]) -> dict[str, float]:
        return _scores(*pair, names, _ON_CPU)

    # OpenCV wants channels last: no copy, where the memory is in this order already.
    rows = (rearrange(each, "b c h w -> b h (w c)") for each in (generated, target))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        scores_of_image = list(pool.map(work, zip(*(each.numpy() for each in rows), strict=True)))
    return {
        name: torch.tensor([each[name] for each in scores_of_image], dtype=torch.float64)
        for name in names
    }


def check_windows(size: tuple[int, int], names: Collection[str]) -> None:
    """Check that metrics can be computed of images of a size (height, width).

    Raises:
        ValueError: If the images are smaller than a metric's window.
    """
    height, width = size
    for name, window in (("ssim_paper", _UNIFORM), ("ssim_256", _GAUSSIAN), ("ssim", _GAUSSIAN)):
        if name in names and min(height, width) < len(window):
            raise ValueError(
                f"{name} has a window of {len(window)} pixels, the images are {height}x{width}; "
                "leave this metric out"
            )


@dataclass(frozen=True, kw_only=True)
class _Operations:
    """What is done differently on a batch of tensors, and on one image in an array of rows."""

    plane_means: Callable[[Any], Any]
    """Of each colour, to subtract."""
    window_means: Callable[[Any, np.ndarray], Any]
    """Only where the window lies inside the image; the result may be overwritten."""
    inside: Callable[[Any, int], Any]
    """Plane means for so many window means less, on either side."""
    average: Callable[[Any], Any]
    spread: Callable[[Any], Any]
    """Highest less lowest value; NaN if they are equal."""


def _scores(x: Any, y: Any, names: Collection[str], at: _Operations) -> dict[str, Any]:
    """Compute metrics from s = x + y and d = x - y, whose squares all SSIMs share.

    Variances are those of values less the planes' means, without which float32 would lose them to
    cancellation.
    """
    s, d = x + y, x - y
    offset = at.plane_means(s)
    s -= offset
    powers = (s, d, s * s, d * d)
    scores = {"psnr": -10 * _log10(at.average(powers[3]))}
    windows = (
        (_UNIFORM, _TO_SAMPLE_COVARIANCE, {"ssim_paper": lambda: 1.0}),
        (_GAUSSIAN, 1.0, {"ssim": lambda: 1.0, "ssim_256": lambda: at.spread(x)}),
    )
    for window, to_covariance, ranges in windows:
        wanted = {name: find() for name, find in ranges.items() if name in names}
        if wanted:
            means = tuple(at.window_means(each, window) for each in powers)
            around = at.inside(offset, len(window) // 2)
            maps = _ssim_maps(means, around, to_covariance, wanted.values())
            scores |= {name: at.average(each) for name, each in zip(wanted, maps, strict=True)}
    return scores


def _ssim_maps(
    means: tuple[Any, ...], offset: Any, to_covariance: float, ranges: Iterable[Any]
) -> Iterator[Any]:
    """Yield SSIM at each place for each data range, given the window means of s, d, s² and d².

    With variances V the usual formula is (s² - d²)(V_s - V_d) / (s² + d²)(V_s + V_d), but for the
    constants. So equal images, whose d is 0, have an SSIM of exactly 1. Works in place: new arrays
    would cost as much as the arithmetic.
    """
    s, d, s2, d2 = means
    s2 -= s * s  # V_s
    s += offset
    s *= s
    d *= d
    d2 -= d  # V_d
    squares, variances = s + d, s2 + d2
    s -= d
    s2 -= d2
    for data_range in ranges:
        c1, c2 = 2 * (0.01 * data_range) ** 2, 2 * (0.03 * data_range) ** 2 / to_covariance
        ssim_map, structure = s + c1, s2 + c2
        ssim_map /= squares + c1
        structure /= variances + c2
        ssim_map *= structure
        yield ssim_map


def _means_on_device(planes: Tensor, window: np.ndarray) -> Tensor:
    kernel = torch.from_numpy(window).to(planes).expand(planes.shape[1], 1, -1)
    down = F.conv2d(planes, kernel[..., None], groups=planes.shape[1])
    return F.conv2d(down, kernel[:, :, None], groups=planes.shape[1])


def _means_on_cpu(rows: np.ndarray, window: np.ndarray) -> np.ndarray:
    """OpenCV filters some ten times faster than torch's convolution does on a CPU."""
    size, edge = len(window), len(window) // 2
    image = rows.reshape(len(rows), -1, 3)
    if window is _UNIFORM:
        means = cv2.boxFilter(image, -1, (size, size))
    else:
        means = cv2.sepFilter2D(image, -1, window, window)
    return np.ascontiguousarray(means[edge:-edge, edge:-edge]).reshape(len(rows) - 2 * edge, -1)


def _plane_means_on_cpu(rows: np.ndarray) -> np.ndarray:
    """One row, with the mean of each channel where that channel's values stand."""
    means = cv2.mean(rows.reshape(len(rows), -1, 3))[:3]
    return np.tile(np.array(means, np.float32), rows.shape[1] // 3)


def _spread_on_cpu(rows: np.ndarray) -> np.float32:
    return np.float32(np.ptp(rows) or np.nan)


def _spread_on_device(images: Tensor) -> Tensor:
    axes = (1, 2, 3)
    spread = images.amax(axes, keepdim=True) - images.amin(axes, keepdim=True)
    return torch.where(spread == 0, torch.nan, spread)


def _log10(values: Any) -> Any:
    if isinstance(values, Tensor):
        return values.log10()
    with np.errstate(divide="ignore"):
        return np.log10(values)


_ON_DEVICE = _Operations(
    plane_means=lambda images: images.mean((2, 3), keepdim=True),
    window_means=_means_on_device,
    inside=lambda means, _edge: means,
    average=lambda values: values.mean((1, 2, 3), dtype=torch.float64),
    spread=_spread_on_device,
)
_ON_CPU = _Operations(
    plane_means=_plane_means_on_cpu,
    window_means=_means_on_cpu,
    inside=lambda means, edge: means[3 * edge : len(means) - 3 * edge],
    average=lambda values: cv2.mean(values)[0],
    spread=_spread_on_cpu,
)
