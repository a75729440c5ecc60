"""How well pictures of drawn persons show the pose and the person, where the truth is known."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float, Float64, UInt8

from cfld.metrics import pair_metrics
from preprocessing.figures import find_silhouette
from preprocessing.figures.clothes import Region

Pictures = UInt8[np.ndarray, "pairs height width 3"]


@dataclass(frozen=True, kw_only=True)
class DrawnScores:
    """Scores of pictures against the drawn targets, one for each pair.

    `silhouette_iou`: of the figure found against the background, with the target's true regions.
    `clothes_error`: mean absolute difference of colours in [0, 1], where the target has clothes.
    """

    silhouette_iou: Float64[np.ndarray, " pairs"]
    clothes_error: Float64[np.ndarray, " pairs"]
    ssim: Float64[np.ndarray, " pairs"]
    psnr: Float64[np.ndarray, " pairs"]

    def means(self) -> dict[str, float]:
        """Return each score's mean over the pairs."""
        return {name: float(np.nanmean(values)) for name, values in vars(self).items()}


def score_pictures(
    pictures: Pictures, targets: Pictures, regions: UInt8[np.ndarray, "pairs height width"]
) -> DrawnScores:
    """Score pictures against their targets; `regions` are the targets' (`Region`)."""
    found = np.stack([find_silhouette(picture) for picture in pictures])
    figure = regions != Region.BACKGROUND
    iou = (found & figure).sum(axis=(1, 2)) / (found | figure).sum(axis=(1, 2))
    clothes = (regions == Region.TOP) | (regions == Region.BOTTOM)
    difference = np.abs(pictures.astype(np.float64) - targets).mean(axis=3) / 255
    num_pixels = clothes.sum(axis=(1, 2))
    error = np.where(clothes, difference, 0).sum(axis=(1, 2)) / np.where(
        num_pixels, num_pixels, np.nan
    )
    pairs = pair_metrics(_to_unit(pictures), _to_unit(targets), ("psnr", "ssim"))
    return DrawnScores(
        silhouette_iou=iou,
        clothes_error=error,
        ssim=pairs["ssim"].numpy().astype(np.float64),
        psnr=pairs["psnr"].numpy().astype(np.float64),
    )


def _to_unit(pictures: Pictures) -> Float[torch.Tensor, "pairs 3 height width"]:
    return rearrange(torch.from_numpy(pictures), "n h w c -> n c h w").float() / 255
