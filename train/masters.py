"""Master weights and Adam moments by parameter name, however DeepSpeed lays them out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from train.engine import MAX_STAGE, DeepSpeedEngine, EngineError

WEIGHTS = "weights"
MOMENTS = ("exp_avg", "exp_avg_sq")


class Masters:
    """What Adam keeps of each trained parameter, in fp32: the same view at every ZeRO stage.

    Reading is collective: all ranks read the same parameters in the same order.
    """

    def __init__(self, engine: DeepSpeedEngine) -> None:
        """Also create Adam's moments, which DeepSpeed would do in the first step only.

        Raises:
            EngineError: If DeepSpeed's own settings chose an optimizer that is not known here.
        """
        import deepspeed.utils

        self._utils = deepspeed.utils
        self.parameters: dict[str, nn.Parameter] = {
            name: parameter
            for name, parameter in engine.module.named_parameters()
            if parameter.requires_grad
        }
        self._stage = engine.zero_optimization_stage()
        self._optimizer = engine.optimizer
        self._adam: torch.optim.Optimizer = engine.basic_optimizer
        self._copies = {id(p): p for p in self.parameters.values()}
        if self._stage == 0 and hasattr(engine.optimizer, "fp32_groups"):
            self._copies = {
                id(low): high
                for lows, highs in zip(
                    engine.optimizer.fp16_groups, engine.optimizer.fp32_groups, strict=True
                )
                for low, high in zip(lows, highs, strict=True)
            }
        for tensor in self._tensors():
            self._adam.state[tensor] = {
                "step": torch.zeros((), device=tensor.device),
                **{kind: torch.zeros_like(tensor) for kind in MOMENTS},
            }
        if self._stage in (1, 2):
            engine.optimizer._lazy_init_hp_params_optimizer_state()

    @property
    def sizes(self) -> dict[str, int]:
        """Numbers in each parameter, whole."""
        return {name: getattr(p, "ds_numel", p.numel()) for name, p in self.parameters.items()}

    def read(self, name: str, kind: str = WEIGHTS) -> Tensor:
        """Return the whole master weight of a parameter, or one of its moments, in fp32."""
        parameter = self.parameters[name]
        if self._stage == 0:
            return self._own(parameter, kind).detach().to(torch.float32)
        if kind == WEIGHTS:
            return self._utils.safe_get_full_fp32_param(parameter)
        return self._utils.safe_get_full_optimizer_state(parameter, kind)

    def write(self, name: str, value: Tensor, kind: str = WEIGHTS) -> None:
        """Set what this rank holds of a master weight or a moment.

        The weights that the model computes with are left as they are.
        """
        parameter = self.parameters[name]
        if self._stage == 0:
            self._own(parameter, kind).data.copy_(value)
        elif self._stage == MAX_STAGE:
            self._write_piece(parameter, value, kind)
        elif kind == WEIGHTS:
            self._utils.safe_set_full_fp32_param(parameter, value)
        else:
            self._utils.safe_set_full_optimizer_state(parameter, value, kind)

    @property
    def num_updates(self) -> int:
        """How many updates Adam has made, which its bias correction depends on."""
        return int(self._adam.state[next(self._tensors())]["step"].item())

    @num_updates.setter
    def num_updates(self, value: int) -> None:
        for tensor in self._tensors():
            self._adam.state[tensor]["step"].fill_(value)

    def _write_piece(self, parameter: Any, value: Tensor, kind: str) -> None:
        # DeepSpeed's setter of whole parameters fails (0.19) where they do not divide by the ranks.
        size = parameter.ds_tensor.numel()
        start = size * dist.get_rank()
        piece = value.flatten()[start : start + size]
        piece = F.pad(piece, (0, size - piece.numel()))
        if kind == WEIGHTS:
            self._utils.safe_set_local_fp32_param(parameter, piece)
        else:
            self._utils.safe_set_local_optimizer_state(parameter, piece, kind)

    def _own(self, parameter: nn.Parameter, kind: str) -> Tensor:
        tensor = self._copies[id(parameter)]
        return tensor if kind == WEIGHTS else self._adam.state[tensor][kind]

    def _tensors(self) -> Iterator[Tensor]:
        """What Adam sees as its parameters: flat pieces of the masters from stage 1 on."""
        attribute = {
            1: "single_partition_of_fp32_groups",
            2: "single_partition_of_fp32_groups",
            3: "fp32_partitioned_groups_flat",
        }.get(self._stage)
        if attribute is None:
            yield from self._copies.values()
        elif hasattr(self._optimizer, attribute):
            yield from getattr(self._optimizer, attribute)
        else:
            raise EngineError(
                f"DeepSpeed's {type(self._optimizer).__name__} has no checkpoints here; leave "
                "data_types, zenflow and superoffload out of the DeepSpeed settings"
            )
