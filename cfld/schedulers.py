"""Which of diffusers' schedulers can take the place of the one that weights were trained with."""

from __future__ import annotations

import inspect

import diffusers
import torch
from diffusers import SchedulerMixin
from diffusers.utils import logging

SUFFIX = "Scheduler"
NEEDED = {"num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "prediction_type"}
"""What a scheduler must take to denoise what these weights predict."""

_NUM_STEPS = 10
_TOLERANCE = 1e-6  # some set the last alpha to 2^-24 where it is 0


def compatible_schedulers(scheduler: SchedulerMixin) -> dict[str, type[SchedulerMixin]]:
    """Schedulers of diffusers that can take the place of this one, by short name such as `ddim`.

    They go from noise to images through the same noise schedule, and know what the UNet predicts.
    """
    exported = (getattr(diffusers, name) for name in dir(diffusers) if name.endswith(SUFFIX))
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        fitting = {
            short_name(each.__name__): each
            for each in exported
            if issubclass(each, SchedulerMixin) and _fits(each, scheduler)
        }
    finally:
        logging.set_verbosity(verbosity)
    return dict(sorted(fitting.items()))


def short_name(name: str) -> str:
    """`ddim` for `DDIMScheduler`, or for itself."""
    return name.removesuffix(SUFFIX).lower()


def _fits(candidate: type[SchedulerMixin], scheduler: SchedulerMixin) -> bool:
    if not inspect.signature(candidate).parameters.keys() >= NEEDED:
        return False
    found = candidate.from_config(scheduler.config)
    alphas = found.alphas_cumprod.to(scheduler.alphas_cumprod)
    if not torch.allclose(alphas, scheduler.alphas_cumprod, rtol=0, atol=_TOLERANCE):
        return False
    found.set_timesteps(_NUM_STEPS)
    first = found.timesteps[0]
    if first < found.timesteps[-1]:
        return False
    latents = found.scale_model_input(torch.zeros(1, 1, 1, 1), first)
    try:
        with torch.random.fork_rng(devices=[]):
            found.step(latents, first, latents)
    except (NotImplementedError, ValueError):  # it cannot take such predictions
        return False
    return True
