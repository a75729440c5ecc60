"""The weights that a run begins with: pretrained, or from a pipeline's folder."""

from __future__ import annotations

import hashlib

import torch
from torch import nn

from cfld.config_file import ConfigError
from cfld.model import CFLD
from cfld.pipeline import CFLDPipeline
from train.config import TrainConfig


def build_model(config: TrainConfig) -> CFLD:
    """Build the model with the weights that training starts from.

    Raises:
        ConfigError: If `start_from` is no folder of a pipeline of the same model.
    """
    if config.start_from is None:
        return CFLD(config.model)
    try:
        pipeline = CFLDPipeline.from_pretrained(config.start_from)
    except (OSError, ValueError) as error:  # no such folder, or weights that are not whole
        raise ConfigError(f"start_from: {config.start_from}: {error}") from error
    if pipeline.conditioner.settings != config.model:
        raise ConfigError(
            f"start_from: {config.start_from} was made with other settings than 'model' here; "
            "choose the preset and settings it was trained with"
        )
    return pipeline.to_model()


def hash_frozen(model: nn.Module) -> str:
    """Return the SHA-256 of all weights that do not train, which checkpoints depend on."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        if not parameter.requires_grad:
            digest.update(f"{name} {list(parameter.shape)} {parameter.dtype}".encode())
            digest.update(parameter.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
