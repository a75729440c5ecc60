"""Pictures of progress: fixed pairs, each as source, target pose, target and what is generated."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from diffusers import DDIMScheduler
from einops import rearrange
from jaxtyping import UInt8
from torch import Generator

from cfld.codec import Codec
from cfld.images import resize_image
from cfld.model import CFLD
from cfld.pipeline import CFLDPipeline
from cfld.pose import make_pose_maps
from train.batch import Batch
from train.engine import DeepSpeedEngine


@dataclass(frozen=True, kw_only=True)
class PictureConfig:
    """What is drawn, and when."""

    every_steps: int = 1000
    """0 draws none."""
    num_pairs: int = 4
    num_inference_steps: int = 20
    """Of DDIM."""
    pose_guidance_scale: float = 2.0
    appearance_guidance_scale: float = 2.0

    def __post_init__(self) -> None:
        if min(self.every_steps, self.num_pairs - 1, self.num_inference_steps - 1) < 0:
            raise ValueError("pictures: every_steps must be 0 or more, the other numbers positive")


def spread_pairs(num_pairs: int, num_wanted: int) -> list[int]:
    """Choose pairs that lie far apart, the same whenever it is asked."""
    chosen = np.linspace(0, num_pairs, num_wanted, endpoint=False).astype(int)
    return sorted(set(chosen.tolist()))


def generate_grid(
    engine: DeepSpeedEngine, codec: Codec, batch: Batch, config: PictureConfig
) -> UInt8[np.ndarray, "height width 3"]:
    """Generate the pairs of a batch and lay them out, a row per pair; collective with ZeRO-3."""
    model: CFLD = engine.module
    size = model.config.image_size
    poses = make_pose_maps(batch.skeletons(), batch.points)[batch.target]
    sources = [batch.images[place].numpy() for place in batch.source.tolist()]
    with _ready_to_sample(engine):
        pipeline = CFLDPipeline.from_model(model, codec)
        pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
        pipeline.set_progress_bar_config(disable=True)
        (generated,) = pipeline(
            sources,
            list(poses),
            height=size[0],
            width=size[1],
            num_inference_steps=config.num_inference_steps,
            pose_guidance_scale=config.pose_guidance_scale,
            appearance_guidance_scale=config.appearance_guidance_scale,
            generator=[Generator().manual_seed(number) for number in range(len(sources))],
            output_type="np",
            return_dict=False,
        )
    skeletons = batch.skeletons()[batch.target].numpy()
    columns = [
        np.stack(sources),
        np.stack([resize_image(skeleton, size) for skeleton in skeletons]),
        np.stack([batch.images[place].numpy() for place in batch.target.tolist()]),
        (generated * 255).round().astype(np.uint8),
    ]
    return join_grid(columns)


def join_grid(
    columns: Sequence[UInt8[np.ndarray, "rows height width 3"]],
) -> UInt8[np.ndarray, "_ _ 3"]:
    """Lay out images, given by column, without gaps."""
    return rearrange(np.stack(columns), "columns rows h w c -> (rows h) (columns w) c")


@contextmanager
def _ready_to_sample(engine: DeepSpeedEngine) -> Iterator[None]:
    """Gather what no submodule's forward would with ZeRO-3; leave the random state as it is."""
    model: CFLD = engine.module
    state = torch.random.get_rng_state()
    try:
        if engine.zero_optimization_stage() == 3:
            from deepspeed import zero

            with zero.GatheredParameters([model.learnable_vector]):
                yield
        else:
            yield
    finally:
        torch.random.set_rng_state(state)
