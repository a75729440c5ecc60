"""Going on from a checkpoint: weights into the model, then all else into the engine around it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from train.checkpoint import KINDS, Checkpoint, CheckpointError
from train.engine import DeepSpeedEngine
from train.loader import Loader
from train.masters import WEIGHTS, Masters

# Of DeepSpeed's several loss scalers, what changes while training.
_SCALER_FIELDS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def check_frozen(checkpoint: Checkpoint, sha256: str) -> None:
    """Compare the frozen weights with those of the run that wrote the checkpoint.

    Raises:
        CheckpointError: If they differ.
    """
    expected = checkpoint.state.frozen_sha256
    if sha256 != expected:
        raise CheckpointError(
            f"{checkpoint.folder}: was trained on frozen weights with sha256 {expected[:12]}…, "
            f"these have {sha256[:12]}…; use the same model.*.pretrained, start_from and seed"
        )


@torch.no_grad()
def load_weights(model: nn.Module, checkpoint: Checkpoint, kind: str = WEIGHTS) -> None:
    """Copy a checkpoint's weights (or their average) into a model that no engine holds yet.

    Raises:
        CheckpointError: If the trained parameters or their shapes are others.
    """
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    differing = sorted(set(parameters) ^ checkpoint.names(kind))
    if differing:
        raise CheckpointError(
            f"{checkpoint.folder}: the model and the checkpoint differ in {len(differing)} trained "
            f"parameters, such as {differing[0]}; use the model settings it was trained with"
        )
    for name, parameter in parameters.items():
        tensor = checkpoint.read(kind, name)
        if tensor.shape != parameter.shape:
            raise CheckpointError(
                f"{checkpoint.folder}: {name} has the shape {list(tensor.shape)}, the model's "
                f"{list(parameter.shape)}; use the model settings it was trained with"
            )
        parameter.copy_(tensor)


def load_state(
    checkpoint: Checkpoint, masters: Masters, engine: DeepSpeedEngine, loader: Loader
) -> None:
    """Restore masters, moments, loss scale and position; the model has its weights already.

    Masters are set once more, because an engine in half precision made them of rounded weights.

    Raises:
        ValueError: If the checkpoint belongs to another order of pairs.
    """
    state = checkpoint.state
    loader.load_state_dict(state.loader)
    for kind in KINDS:
        for name in masters.parameters:
            masters.write(name, checkpoint.read(kind, name), kind)
    masters.num_updates = state.num_updates
    scaler = _scaler(engine)
    for field in _SCALER_FIELDS:
        if field in state.scaler and hasattr(scaler, field):
            setattr(scaler, field, state.scaler[field])


def scaler_state(engine: DeepSpeedEngine) -> dict[str, float]:
    """Return the state of the loss scaler; empty if there is none."""
    scaler = _scaler(engine)
    return {field: getattr(scaler, field) for field in _SCALER_FIELDS if hasattr(scaler, field)}


def loss_scale(engine: DeepSpeedEngine) -> float:
    """Return what the loss is multiplied by before the backward; 1 without a loss scaler."""
    return float(scaler_state(engine).get("cur_scale", 1.0))


def _scaler(engine: DeepSpeedEngine) -> Any:
    for name in ("loss_scaler", "loss_scale_config"):
        if hasattr(engine.optimizer, name):
            return getattr(engine.optimizer, name)
    return None
