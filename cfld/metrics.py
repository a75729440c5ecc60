"""Scores of one generated image against its target: PSNR and three kinds of SSIM, in batches.

Images are RGB in [0, 1]. The SSIMs differ in window, covariance and data range, hence the names:

| name | window | covariance | data range | used by |
|---|---|---|---|---|
| `ssim_paper` | uniform, 51 | sample | 1 | CFLD's tables (NTED's protocol) |
| `ssim_256` | Gaussian, sigma 1.5 | population | max - min of the generated image | PATN's heirs |
| `ssim` | Gaussian, sigma 1.5 | population | 1 | Wang et al. 2004: the usual one |
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import cv2
import numpy as np
import torch
import torch.nn.functional as F
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

# Window means of planes, only where the window lies inside the image.
_WindowMeans = Callable[..., Any]


def psnr(generated: Images, target: Images) -> PerImage:
    """Peak signal-to-noise ratio in dB for a data range of 1; infinite for equal images."""
    return pair_metrics(generated, target, ["psnr"])["psnr"]


def ssim_paper(generated: Images, target: Images) -> PerImage:
    """SSIM of the paper's tables, in [-1, 1]: uniform window of 51 pixels, sample covariance.

    Raises:
        ValueError: If the images are smaller than the window.
    """
    return pair_metrics(generated, target, ["ssim_paper"])["ssim_paper"]


def ssim_256(generated: Images, target: Images) -> PerImage:
    """SSIM of older pose-transfer work, in [-1, 1]; NaN if the generated image has one colour only.

    Its data range is the generated image's own max - min, so a dull image is judged more severely
    than by `ssim`.

    Raises:
        ValueError: If the images are smaller than the window.
    """
    return pair_metrics(generated, target, ["ssim_256"])["ssim_256"]


def ssim(generated: Images, target: Images) -> PerImage:
    """The usual SSIM, in [-1, 1]: Gaussian window, population covariance, data range 1.

    Raises:
        ValueError: If the images are smaller than the window.
    """
    return pair_metrics(generated, target, ["ssim"])["ssim"]


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
        values = _pair_metrics(generated, target, names, _window_means_on_device)
        return {name: values[name] for name in names}

    def work(pair: tuple[np.ndarray, np.ndarray]) -> dict[str, Any]:
        return _pair_metrics(pair[0][None], pair[1][None], names, _window_means_on_cpu)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        rows = list(pool.map(work, zip(generated.numpy(), target.numpy(), strict=True)))
    return {name: torch.from_numpy(np.concatenate([row[name] for row in rows])) for name in names}


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


def _pair_metrics(x: Any, y: Any, names: Collection[str], means: _WindowMeans) -> dict[str, Any]:
    """Compute metrics of a batch [batch, 3, height, width] of arrays or tensors.

    Variances are those of values less the planes' common mean, without which float32 would lose
    them to cancellation.
    """
    values = {}
    if "psnr" in names:
        values["psnr"] = -10 * _log10(_average((x - y) ** 2))
    if set(names) <= {"psnr"}:
        return values
    centre = (x + y).mean((2, 3), keepdims=True) / 2
    if "ssim_paper" in names:
        moments = _moments(x, y, centre, partial(means, window=_UNIFORM), _TO_SAMPLE_COVARIANCE)
        values["ssim_paper"] = _average(_ssim_map(moments, 1.0))
    if "ssim" in names or "ssim_256" in names:
        moments = _moments(x, y, centre, partial(means, window=_GAUSSIAN), 1.0)
        if "ssim" in names:
            values["ssim"] = _average(_ssim_map(moments, 1.0))
        if "ssim_256" in names:
            data_range = _highest(x) - _highest(x, -1)
            data_range[data_range == 0] = np.nan
            values["ssim_256"] = _average(_ssim_map(moments, data_range))
    return values


def _moments(
    x: Any, y: Any, centre: Any, means: Callable[[Any], Any], to_covariance: float
) -> tuple[Any, ...]:
    """Return 2 mx my, mx² + my², 2 cov(x, y) and var x + var y at each place of a window.

    The brackets see to it that equal images have equal moments, hence an SSIM of exactly 1.
    """
    x, y = x - centre, y - centre
    mean_x, mean_y = means(x), means(y)
    covariances = (2 * to_covariance) * (means(x * y) - mean_x * mean_y)
    squares = mean_x * mean_x + mean_y * mean_y
    variances = to_covariance * (means(x * x + y * y) - squares)
    mean_x, mean_y = mean_x + centre, mean_y + centre
    return 2 * mean_x * mean_y, mean_x * mean_x + mean_y * mean_y, covariances, variances


def _ssim_map(moments: tuple[Any, ...], data_range: Any) -> Any:
    product, squares, covariances, variances = moments
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    return (product + c1) / (squares + c1) * ((covariances + c2) / (variances + c2))


def _window_means_on_device(planes: Tensor, window: np.ndarray) -> Tensor:
    kernel = torch.from_numpy(window).to(planes).expand(planes.shape[1], 1, -1)
    down = F.conv2d(planes, kernel[..., None], groups=planes.shape[1])
    return F.conv2d(down, kernel[:, :, None], groups=planes.shape[1])


def _window_means_on_cpu(planes: np.ndarray, window: np.ndarray) -> np.ndarray:
    """OpenCV filters planes some ten times faster than torch's convolution does on a CPU.

    The planes are filtered as one tall image: where a window crosses from one to the next, it does
    not lie inside the image, and is cut off.
    """
    size, inside = len(window), slice(len(window) // 2, -(len(window) // 2))
    tall = np.ascontiguousarray(planes).reshape(-1, planes.shape[-1])
    if window is _UNIFORM:
        means = cv2.boxFilter(tall, -1, (size, size))
    else:
        means = cv2.sepFilter2D(tall, -1, window, window)
    return means.reshape(planes.shape)[:, :, inside, inside]


def _average(values: Any) -> Any:
    axes = (1, 2, 3)
    if isinstance(values, Tensor):
        return values.mean(axes, dtype=torch.float64)
    return values.mean(axes, dtype=np.float64)


def _highest(values: Any, sign: int = 1) -> Any:
    axes = (1, 2, 3)
    if isinstance(values, Tensor):
        return sign * (sign * values).amax(axes, keepdim=True)
    return sign * (sign * values).max(axes, keepdims=True)


def _log10(values: Any) -> Any:
    if isinstance(values, Tensor):
        return values.log10()
    with np.errstate(divide="ignore"):
        return np.log10(values)
