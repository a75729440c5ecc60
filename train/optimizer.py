"""The optimizer: Adam over the trained weights, at a rate that may differ from part to part."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import nn

from cfld.config import PARTS

FACTOR = "factor"


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Adam, with decoupled weight decay if there is any; the defaults are the paper's."""

    rate_per_pair: float = 5e-7
    """Learning rate divided by the global batch."""
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip_norm: float | None = 1.0
    """Longest gradient of all trained weights together; longer ones are scaled down to it."""
    part_factors: dict[str, float] = field(default_factory=dict)
    """Factors on the learning rate of parts of the model, such as `source_encoder: 0.05`."""

    def __post_init__(self) -> None:
        unknown = set(self.part_factors) - set(PARTS)
        if unknown:
            raise ValueError(
                f"optimizer.part_factors has {sorted(unknown)}; the parts are {list(PARTS)}"
            )
        if self.rate_per_pair <= 0:
            raise ValueError(f"optimizer.rate_per_pair is {self.rate_per_pair}, must be positive")
        if self.clip_norm is not None and self.clip_norm <= 0:
            raise ValueError(
                f"optimizer.clip_norm is {self.clip_norm}, must be positive; null is no limit"
            )


def build_optimizer(
    model: nn.Module, config: OptimizerConfig, *, fused: bool = True
) -> torch.optim.AdamW:
    """AdamW over the trained weights, a group for each factor; its rate is set before each step.

    Its rate begins at 0, because DeepSpeed takes a first step with zero gradients in some modes.
    """
    groups: dict[float, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            factor = config.part_factors.get(name.partition(".")[0], 1.0)
            groups.setdefault(factor, []).append(parameter)
    return torch.optim.AdamW(
        [{"params": parameters, FACTOR: factor} for factor, parameters in groups.items()],
        lr=0.0,
        betas=(config.betas[0], config.betas[1]),
        eps=config.eps,
        weight_decay=config.weight_decay,
        fused=fused,
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the rate of every group, each times its factor."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group[FACTOR]
