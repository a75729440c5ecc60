"""The training objective: noised latents, cubic timesteps, condition dropout, loss (CFLD 3.3)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from diffusers import DDPMScheduler
from jaxtyping import Float, Int
from torch import Generator, Tensor

from cfld.checks import check_choice, check_sizes
from cfld.conditioning import Kept

BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")
CONDITIONS = ("prompt", "pose", "appearance")

Rows = Float[Tensor, " rows"]
Latents = Float[Tensor, "rows channels height width"]


@dataclass(frozen=True, kw_only=True)
class DiffusionConfig:
    """The noise schedule and the objective; the defaults are the paper's."""

    num_steps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    beta_schedule: str = "scaled_linear"
    prediction_type: str = "epsilon"
    """What the UNet predicts, in diffusers' words: `epsilon`, `sample` or `v_prediction`."""
    zero_terminal_snr: bool = False
    """Whether the last timestep is pure noise."""
    timesteps: str = "cubic"
    """How timesteps are drawn: `cubic` or `uniform`."""
    dropout: float = 0.2
    """Probability that a row loses its conditions (the paper's eta)."""
    dropped: tuple[str, ...] = CONDITIONS
    """Which conditions it loses; the authors' released code drops the prompt alone."""

    def __post_init__(self) -> None:
        check_sizes("diffusion", self, "num_steps")
        check_choice("diffusion.timesteps", self.timesteps, TIMESTEPS)
        check_choice("diffusion.beta_schedule", self.beta_schedule, BETA_SCHEDULES)
        check_choice("diffusion.prediction_type", self.prediction_type, PREDICTION_TYPES)
        if self.zero_terminal_snr and self.prediction_type == "epsilon":
            raise ValueError(
                "diffusion.zero_terminal_snr leaves no image at the last timestep, where epsilon "
                "tells nothing of it; set diffusion.prediction_type to sample or v_prediction, or "
                "zero_terminal_snr to false"
            )
        if set(self.dropped) - set(CONDITIONS):
            raise ValueError(
                f"diffusion.dropped is {tuple(self.dropped)}; choose among {CONDITIONS}"
            )
        if not 0 <= self.dropout <= 1:
            raise ValueError(f"diffusion.dropout is {self.dropout}; it must lie in [0, 1]")


@dataclass(frozen=True, kw_only=True)
class Draws:
    """The random numbers of a batch: its loss is a function of them and the weights.

    Stochastic depth in S is the exception: it draws from torch's global generator.
    """

    noise: Latents
    timesteps: Rows
    """Uniform in [0, 1)."""
    dropout: Rows
    """Uniform in [0, 1)."""


@dataclass(frozen=True, kw_only=True)
class TrainingBatch:
    """B pairs. Rows are 2B: first all source-to-source, then all source-to-target (CFLD Eq. 6)."""

    source: Float[Tensor, "pairs 3 source_height source_width"]
    """In [-1, 1]."""
    pose_maps: Float[Tensor, "rows 21 pose_height pose_width"]
    """In [0, 1]: of the source images, then of the target images."""
    latents: Latents
    """Of the source images, then of the target images."""
    draws: Draws


class Losses(NamedTuple):
    """A tuple, because DeepSpeed looks for tensors in tuples but not in dataclasses."""

    mean: Float[Tensor, ""]
    rows: Rows
    """The loss of each row, detached: to find the pair behind a loss that is not finite."""


def draw_rows(generators: Sequence[Generator], latent_shape: Sequence[int]) -> Draws:
    """Random numbers of 2B rows from one generator for each of the B pairs.

    A pair's numbers depend on its generator alone, not on its place or its neighbours.
    `latent_shape` is (channels, height, width).
    """
    per_pair = [
        (
            torch.randn(2, *latent_shape, generator=generator, device=generator.device),
            torch.rand(2, generator=generator, device=generator.device),
            torch.rand(2, generator=generator, device=generator.device),
        )
        for generator in generators
    ]
    noise, timesteps, dropout = (
        torch.stack(draws, dim=1).flatten(0, 1) for draws in zip(*per_pair, strict=True)
    )
    return Draws(noise=noise, timesteps=timesteps, dropout=dropout)


def cubic_timesteps(u: Rows, num_steps: int) -> Int[Tensor, " rows"]:
    """Map uniform draws to timesteps t = (1 - u^3) T, so that large t are drawn more often.

    Source: CFLD Sec. 3.3. t is truncated to an integer in [0, T - 1], where the paper counts
    from 1.
    """
    return _truncate((1 - u.to(torch.float32) ** 3) * num_steps, num_steps)


def uniform_timesteps(u: Rows, num_steps: int) -> Int[Tensor, " rows"]:
    """Map uniform draws to timesteps that are all equally likely."""
    return _truncate(u.to(torch.float32) * num_steps, num_steps)


def _truncate(t: Rows, num_steps: int) -> Int[Tensor, " rows"]:
    return t.long().clamp(0, num_steps - 1)


TIMESTEPS = {"cubic": cubic_timesteps, "uniform": uniform_timesteps}


def build_scheduler(config: DiffusionConfig) -> DDPMScheduler:
    """The noise schedule, which is also the paper's sampler."""
    with torch.device("cpu"):
        return DDPMScheduler(
            num_train_timesteps=config.num_steps,
            beta_start=config.beta_start,
            beta_end=config.beta_end,
            beta_schedule=config.beta_schedule,
            prediction_type=config.prediction_type,
            rescale_betas_zero_snr=config.zero_terminal_snr,
            clip_sample=False,
            # Without noise-free timestep T the last one must be among those sampled at.
            timestep_spacing="trailing" if config.zero_terminal_snr else "leading",
            steps_offset=0 if config.zero_terminal_snr else 1,
        )


def kept_conditions(config: DiffusionConfig, dropout: Rows) -> Kept:
    """Which rows keep which conditions, given their uniform draws."""
    kept = dropout >= config.dropout
    everything = torch.ones_like(kept)
    prompt, pose, appearance = (
        kept if condition in config.dropped else everything for condition in CONDITIONS
    )
    return Kept(prompt=prompt, pose=pose, appearance=appearance)


def noised(
    scheduler: DDPMScheduler, latents: Latents, noise: Latents, timesteps: Int[Tensor, " rows"]
) -> Latents:
    """The latents at their timesteps (CFLD Eq. 1), in float32."""
    return scheduler.add_noise(latents.to(torch.float32), noise.to(torch.float32), timesteps)


def regression_targets(
    scheduler: DDPMScheduler, latents: Latents, noise: Latents, timesteps: Int[Tensor, " rows"]
) -> Latents:
    """What the UNet should predict, by the schedule's prediction type, in float32.

    Raises:
        ValueError: If there is no such type.
    """
    latents, noise = latents.to(torch.float32), noise.to(torch.float32)
    match scheduler.config.prediction_type:
        case "epsilon":
            return noise
        case "sample":
            return latents
        case "v_prediction":
            return scheduler.get_velocity(latents, noise, timesteps)
        case other:
            raise ValueError(f"prediction_type is {other!r}; there are {PREDICTION_TYPES}")


def squared_errors(predicted: Latents, targets: Latents) -> Losses:
    """Mean squared error over all rows, in float32: half the sum of both kinds in Eq. 6."""
    rows = (predicted.to(torch.float32) - targets).square().mean(dim=(1, 2, 3))
    return Losses(mean=rows.mean(), rows=rows.detach())
