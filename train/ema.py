"""An exponential moving average of the trained weights, spread over the ranks."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from train.checkpoint import EMA, Checkpoint
from train.masters import Masters


@dataclass(frozen=True, kw_only=True)
class EmaConfig:
    """Whether an average of the weights is kept, which is then what a run exports."""

    decay: float | None = None
    """Weight of the past per step, such as 0.9999; none is kept without it, as in the paper."""
    every_steps: int = 10
    """Steps between updates, each of which counts for all of these steps."""

    def __post_init__(self) -> None:
        if self.decay is not None and not 0 < self.decay < 1:
            raise ValueError(f"ema.decay is {self.decay}, it must lie between 0 and 1")
        if self.every_steps < 1:
            raise ValueError(f"ema.every_steps is {self.every_steps}, it must be positive")


class Ema:
    """The average of the parameters that this rank owns, in fp32 on its device."""

    def __init__(self, config: EmaConfig, masters: Masters, owned: Collection[str]) -> None:
        """Begin with the weights as they are; collective."""
        assert config.decay is not None
        self._decay = config.decay**config.every_steps
        self._every = config.every_steps
        self._masters = masters
        self.weights: dict[str, Tensor] = {}
        for name in masters.parameters:
            weight = masters.read(name)
            if name in owned:
                self.weights[name] = weight.clone()

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after a step, if it is one of every few; collective."""
        if step % self._every:
            return
        for name in self._masters.parameters:
            weight = self._masters.read(name)
            if name in self.weights:
                self.weights[name].lerp_(weight, 1 - self._decay)

    def load(self, checkpoint: Checkpoint) -> None:
        """Go on from a checkpoint's averages."""
        for name, weight in self.weights.items():
            weight.copy_(checkpoint.read(EMA, name))
