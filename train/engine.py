"""The DeepSpeed engine around the one root module, and the settings that DeepSpeed gets."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from train.optimizer import OptimizerConfig

DeepSpeedEngine = Any  # deepspeed is imported when an engine starts: it looks for accelerators
PRECISIONS = ("fp16", "bf16", "autocast", "fp32")
MAX_STAGE = 3


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How the model is spread over the ranks, and in which precision it computes."""

    precision: str = "fp16"
    """`fp16` with dynamic loss scale, `bf16`, `autocast` (fp32 weights, bf16 maths) or `fp32`."""
    micro_batch: int = 28
    """Pairs that a rank computes at a time; gradients accumulate up to the global batch."""
    zero_stage: int = 2
    """What ZeRO spreads over the ranks: 1 optimizer, 2 gradients too, 3 weights too; 0 nothing."""
    offload_optimizer: bool = False
    """Keep master weights and Adam's moments in main memory and update them there."""
    offload_parameters: bool = False
    """Keep weights that are not in use in main memory; needs ZeRO stage 3."""
    channels_last: bool = False
    """Compute convolutions with channels last in memory; needs ZeRO stage 0."""
    compile: bool = False
    """Compile the model with torch.compile."""

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise ValueError(
                f"engine.precision is {self.precision!r}; choose one of {list(PRECISIONS)}"
            )
        if not 0 <= self.zero_stage <= MAX_STAGE:
            raise ValueError(f"engine.zero_stage is {self.zero_stage}; choose 0, 1, 2 or 3")
        needs = {
            "offload_optimizer": (self.zero_stage >= 1, "a zero_stage of 1, 2 or 3"),
            "offload_parameters": (self.zero_stage == MAX_STAGE, "zero_stage 3"),
            "channels_last": (self.zero_stage == 0, "zero_stage 0"),
        }
        for name, (is_met, need) in needs.items():
            if getattr(self, name) and not is_met:
                raise ValueError(f"engine.{name} needs {need}, not {self.zero_stage}")

    @property
    def is_plain(self) -> bool:
        """Whether DeepSpeed hands gradients to the optimizer as they are."""
        return self.zero_stage == 0 and self.precision in ("fp32", "autocast")


class EngineError(ValueError):
    """Settings that DeepSpeed, the machine or the rest of the configuration do not allow."""


# Which of our settings decides a value of DeepSpeed's.
_OWNERS = {
    "train_batch_size": "order.global_batch",
    "train_micro_batch_size_per_gpu": "engine.micro_batch",
    "gradient_accumulation_steps": "order.global_batch, engine.micro_batch and the ranks",
    "gradient_clipping": "optimizer.clip_norm",
    "zero_optimization.stage": "engine.zero_stage",
    "zero_optimization.offload_optimizer.device": "engine.offload_optimizer",
    "zero_optimization.offload_param.device": "engine.offload_parameters",
    "fp16.enabled": "engine.precision",
    "bf16.enabled": "engine.precision",
    "optimizer": "optimizer",
    "scheduler": "schedule",
}


def check_precision(config: EngineConfig, device: torch.device) -> None:
    """Refuse what the device cannot compute.

    Raises:
        EngineError: If it is fp16 on a CPU.
    """
    if config.precision == "fp16" and device.type == "cpu":
        raise EngineError(
            "engine.precision is fp16, which this CPU cannot train in; use "
            "'--set engine.precision=bf16' (or fp32), or a machine with a GPU"
        )


def deepspeed_settings(
    config: EngineConfig,
    optimizer: OptimizerConfig,
    *,
    global_batch: int,
    accumulation: int,
    extra: Path | None = None,
) -> dict[str, Any]:
    """Derive DeepSpeed's settings, merged with those of a user's JSON file.

    Raises:
        EngineError: If the file cannot be read, or contradicts what the configuration decides.
    """
    zero: dict[str, Any] = {"stage": config.zero_stage}
    for name, is_on in (
        ("offload_optimizer", config.offload_optimizer),
        ("offload_param", config.offload_parameters),
    ):
        if is_on:
            zero[name] = {"device": "cpu"}
    # The trainer clips by itself where DeepSpeed would compute the norm parameter by parameter.
    clip_norm = 0.0 if config.is_plain else optimizer.clip_norm or 0.0
    decided = {
        "train_batch_size": global_batch,
        "train_micro_batch_size_per_gpu": config.micro_batch,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": clip_norm,
        "zero_optimization": zero,
        "fp16": {"enabled": config.precision == "fp16"},
        "bf16": {"enabled": config.precision == "bf16"},
    }
    defaults = {
        "steps_per_print": None,
        # torch's fused AdamW needs no compiler, which DeepSpeed's own CPU Adam does.
        "zero_force_ds_cpu_optimizer": False,
        # DeepSpeed would raise at its minimum; `health.max_skipped` stops with advice instead.
        "fp16": {"min_loss_scale": 0},
    }
    theirs = read_settings(extra) if extra else {}
    if extra:
        _check_agreement(extra, theirs, decided)
    return _merge(_merge(defaults, theirs), decided)


def read_settings(path: Path) -> dict[str, Any]:
    """Read a DeepSpeed JSON file.

    Raises:
        EngineError: If it cannot be read or is no JSON object.
    """
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise EngineError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(settings, dict):
        raise EngineError(f"{path}: holds no JSON object")
    return settings


def start_engine(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    config: EngineConfig,
    settings: dict[str, Any],
) -> DeepSpeedEngine:
    """Put a model and its optimizer under one DeepSpeed engine, on this process's device."""
    import deepspeed
    import deepspeed.ops

    # It reports every detail of what it sets up at level INFO, on every rank.
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # On CPUs it would compile an all-reduce through shared memory, which needs a compiler and in
    # which ranks spin for ever once one of them is dead; gloo's tells them.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    os.environ.setdefault("LOCAL_RANK", "0")  # what the launcher would set
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    if config.channels_last:  # only now: DeepSpeed sends contiguous weights to the other ranks
        engine.module.to(memory_format=torch.channels_last)
    if config.compile:
        engine.compile()
    return engine


def _check_agreement(path: Path, theirs: Mapping[str, Any], decided: Mapping[str, Any]) -> None:
    wanted = dict(_leaves(decided))
    for key, value in _leaves(theirs):
        owner = next((o for o in _OWNERS if key == o or key.startswith(f"{o}.")), None)
        if owner is None or value == "auto":
            continue
        if key not in wanted:
            raise EngineError(f"{path}: {owner} is decided by '{_OWNERS[owner]}'; set it there")
        if value != wanted[key]:
            raise EngineError(
                f"{path}: {key} is {value!r}, but the configuration says {wanted[key]!r} "
                f"({_OWNERS[owner]}); change one of them"
            )


def _leaves(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in settings.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        under = merged.get(key)
        if isinstance(under, Mapping) and isinstance(value, Mapping):
            value = _merge(under, value)
        merged[key] = value
    return merged
