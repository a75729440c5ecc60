"""Small models and batches that the tests of the network share."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from cfld.config import PRESETS, CFLDConfig
from cfld.model import CFLD
from cfld.objective import TrainingBatch, draw_rows

TINY = PRESETS["tiny"]


@pytest.fixture
def frozen_config() -> CFLDConfig:
    """`tiny` with the paper's choice of what trains in the UNet."""
    return replace(TINY, unet=replace(TINY.unet, is_frozen=True))


@pytest.fixture
def build() -> Callable[..., CFLD]:
    """Builds a model with seeded random weights; its zero convolutions are not zero if stirred."""

    def build_model(config: CFLDConfig, *, stirred: bool = False) -> CFLD:
        torch.manual_seed(0)
        model = CFLD(config, pretrained=False).eval()
        if stirred:
            with torch.no_grad():
                for branch in model.appearance.branches:
                    for parameter in (*branch.conv_in.parameters(), *branch.conv_out.parameters()):
                        parameter.normal_(std=0.3)
        return model

    return build_model


@pytest.fixture
def model(build: Callable[..., CFLD], frozen_config: CFLDConfig) -> CFLD:
    """A small model as it starts training."""
    return build(frozen_config)


@pytest.fixture
def stirred(build: Callable[..., CFLD], frozen_config: CFLDConfig) -> CFLD:
    """A small model as if it were trained."""
    return build(frozen_config, stirred=True)


@pytest.fixture
def batch() -> TrainingBatch:
    """Two pairs."""
    generator = torch.Generator().manual_seed(0)
    return TrainingBatch(
        source=torch.rand(2, 3, 64, 64, generator=generator) * 2 - 1,
        pose_maps=torch.rand(4, 21, 64, 64, generator=generator),
        latents=torch.randn(4, 48, 16, 16, generator=generator),
        draws=draw_rows([torch.Generator().manual_seed(pair) for pair in (1, 2)], (48, 16, 16)),
    )
