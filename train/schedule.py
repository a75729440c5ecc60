"""The learning rate as a pure function of the step: warm-up, then drops at epochs or a cosine."""

from __future__ import annotations

import math
from dataclasses import dataclass

KINDS = ("drops", "cosine", "constant")


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """How the learning rate changes; the defaults are the paper's."""

    kind: str = "drops"
    """`drops` at epochs, `cosine` down to the last step, or `constant`, each after a warm-up."""
    warmup_steps: int = 1000
    warmup_start: float = 0.1
    """Factor at the first step, from which the warm-up rises to 1, as in the authors' code."""
    drop_epochs: tuple[int, ...] = (50,)
    """Epochs, counted from 0, at whose beginning the rate is multiplied by `drop_factor`."""
    drop_factor: float = 0.1
    final: float = 0.02
    """Factor that the cosine ends at."""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"schedule.kind is {self.kind!r}; choose one of {list(KINDS)}")
        if self.warmup_steps < 0:
            raise ValueError(f"schedule.warmup_steps is {self.warmup_steps}, must be 0 or more")


def learning_rate_factor(
    config: ScheduleConfig, step: int, *, steps_per_epoch: int, num_steps: int
) -> float:
    """What the learning rate is multiplied by in a step, counted from 0 (CFLD Sec. 4.1)."""
    warmup = 1.0
    if step < config.warmup_steps:
        rise = (1 - config.warmup_start) * step / config.warmup_steps
        warmup = config.warmup_start + rise
    return warmup * _decay(config, step, steps_per_epoch, num_steps)


def _decay(config: ScheduleConfig, step: int, steps_per_epoch: int, num_steps: int) -> float:
    match config.kind:
        case "drops":
            epoch = step // steps_per_epoch
            return config.drop_factor ** sum(epoch >= drop for drop in config.drop_epochs)
        case "cosine":
            length = max(1, num_steps - config.warmup_steps)
            progress = min(max((step - config.warmup_steps) / length, 0.0), 1.0)
            return config.final + (1 - config.final) * (1 + math.cos(math.pi * progress)) / 2
        case _:
            return 1.0
