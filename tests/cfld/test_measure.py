import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from cfld.measure import measure


def layers(depth, width):
    with torch.device("meta"):
        return nn.Sequential(
            *(nn.Sequential(nn.Linear(width, width), nn.Tanh()) for _ in range(depth))
        )


def test_forward_alone_holds_two_activations_at_a_time():
    module = nn.Sequential(*(part for layer in layers(5, 64) for part in layer))
    rows = torch.empty(8, 64, device="meta")
    cost = measure(lambda: module(rows).sum(), module, backward=False)
    assert cost.peak_bytes == 2 * 8 * 64 * 4
    assert cost.flops == 5 * 2 * 8 * 64 * 64


def test_backward_needs_all_activations_and_twice_the_operations():
    module, rows = layers(5, 64), torch.empty(800, 64, device="meta")
    cost = measure(lambda: module(rows).sum(), module, backward=True)
    saved = 5 * 800 * 64 * 4  # tanh keeps its output, which is the next layer's input
    assert saved < cost.peak_bytes < 2 * saved
    forward = 5 * 2 * 800 * 64 * 64
    assert cost.flops == 3 * forward - forward // 5  # the input needs no gradient
    assert all(parameter.grad is None for parameter in module.parameters())


def test_checkpointing_is_seen():
    module, rows = layers(8, 64), torch.empty(800, 64, device="meta").requires_grad_()

    def recomputed():
        hidden = rows
        for layer in module:
            hidden = checkpoint(layer, hidden, use_reentrant=False)
        return hidden.sum()

    plain = measure(lambda: module(rows).sum(), module, backward=True)
    small = measure(recomputed, module, backward=True)
    assert small.flops == pytest.approx(plain.flops * 4 / 3, rel=0.01)


@pytest.mark.parametrize("has_mask", [False, True])
def test_attention_is_fused_also_when_recomputed(has_mask):
    with torch.device("meta"):
        module = nn.Linear(32, 32)
        tokens = torch.empty(2, 4, 1024, 32)
        mask = torch.empty(2, 4, 1024, 1024) if has_mask else None

    def attend(hidden):
        return F.scaled_dot_product_attention(hidden, hidden, hidden, attn_mask=mask)

    cost = measure(
        lambda: checkpoint(attend, module(tokens), use_reentrant=False).sum(), module, backward=True
    )
    assert cost.peak_bytes < 2 * 4 * 1024 * 1024 * 4  # less than one matrix of scores
