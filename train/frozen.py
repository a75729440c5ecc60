"""The identity of the frozen weights, which checkpoints do not hold but depend on."""

from __future__ import annotations

import hashlib

import torch
from torch import nn


def hash_frozen(model: nn.Module) -> str:
    """Return the SHA-256 of all weights that do not train, with their names and shapes."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        if not parameter.requires_grad:
            digest.update(f"{name} {list(parameter.shape)} {parameter.dtype}".encode())
            digest.update(parameter.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
