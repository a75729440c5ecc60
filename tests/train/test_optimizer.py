"""Which weights train, and at which rate."""

import torch
from torch import nn

from train.optimizer import OptimizerConfig, build_optimizer, set_learning_rate


def make_model() -> nn.Module:
    model = nn.Module()
    model.source_encoder = nn.Linear(2, 2)
    model.unet = nn.Linear(2, 2)
    model.unet.bias.requires_grad_(False)
    return model


def test_parts_have_their_own_rates_and_frozen_weights_none() -> None:
    model = make_model()
    config = OptimizerConfig(part_factors={"source_encoder": 0.05})
    optimizer = build_optimizer(model, config)
    set_learning_rate(optimizer, 2.0)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert rates == {
        id(model.source_encoder.weight): 0.1,
        id(model.source_encoder.bias): 0.1,
        id(model.unet.weight): 2.0,
    }


def test_without_weight_decay_it_is_adam() -> None:
    models = [make_model(), make_model()]
    models[1].load_state_dict(models[0].state_dict())
    ours = build_optimizer(models[0], OptimizerConfig())
    adam = torch.optim.Adam([p for p in models[1].parameters() if p.requires_grad])
    set_learning_rate(ours, 1e-3)
    for _ in range(5):
        for model, optimizer in zip(models, (ours, adam), strict=True):
            optimizer.zero_grad()
            model.unet(model.source_encoder(torch.ones(1, 2))).square().sum().backward()
            optimizer.step()
    torch.testing.assert_close(models[0].state_dict(), models[1].state_dict())
