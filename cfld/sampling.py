"""How images are sampled: steps, guidance, noise, sizes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from cfld.pipeline_inputs import Size


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How images are generated."""

    num_steps: int = 50
    pose_scale: float = 2.0
    appearance_scale: float = 2.0
    seed: int = 0
    """Of row 0; row i has seed + i, so that no image depends on the batch it is in."""
    size: Size | None = None
    """Height and width of the results; None: of each photo."""
    pose_frame: Size | None = None
    """What keypoints in files refer to; None: each photo's size."""
    batch_size: int = 8

    @property
    def arguments(self) -> dict[str, Any]:
        """What the pipeline takes for all images."""
        height, width = self.size or (None, None)
        return {
            "height": height,
            "width": width,
            "num_inference_steps": self.num_steps,
            "pose_guidance_scale": self.pose_scale,
            "appearance_guidance_scale": self.appearance_scale,
        }

    def generators(self, rows: Iterable[int]) -> list[torch.Generator]:
        """A generator for each of these rows."""
        return [torch.Generator().manual_seed(self.seed + row) for row in rows]
