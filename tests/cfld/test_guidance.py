import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention

from cfld.conditioning import Conditioning
from cfld.guidance import (
    STRATEGIES,
    Term,
    cumulative_terms,
    guide,
    guided_prediction,
)
from cfld.unet import LayerAttention

TIMESTEP = torch.tensor(400)


@pytest.fixture
def conditioning(stirred, batch) -> Conditioning:
    with torch.no_grad():
        return stirred.condition(batch.source, batch.pose_maps[:2])


def reference_prediction(model, latents, prompt, residuals, biases):
    """The UNet with diffusers' own attention; everything else is added by forward hooks."""
    unet = UNet2DConditionModel.from_config(model.unet.config)
    unet.load_state_dict(model.unet.state_dict())
    up_layers = [
        block.transformer_blocks[0].attn2
        for up_block in unet.up_blocks[1:]
        for block in up_block.attentions
    ]
    for layer, bias in zip(up_layers, biases, strict=True):
        layer.to_q.register_forward_hook(lambda _, __, query, bias=bias: query + bias)
    for block, residual in zip(unet.down_blocks, residuals, strict=False):
        block.attentions[-1].register_forward_hook(
            lambda _, __, outputs, residual=residual: (outputs[0] + residual,)
        )
    return unet(latents, TIMESTEP, encoder_hidden_states=prompt).sample


@torch.no_grad()
def test_cumulative_guidance_is_equation_7(stirred, batch, conditioning):
    latents = batch.latents[:2]
    vector = stirred.learnable_vector.expand(2, -1, -1)
    prompt, residuals = conditioning.prompt, conditioning.pose_residuals
    biases = conditioning.appearance_biases
    no_residuals = [torch.zeros_like(residual) for residual in residuals]
    no_biases = [torch.zeros_like(bias) for bias in biases]
    nothing = reference_prediction(stirred, latents, vector, no_residuals, no_biases)
    pose = reference_prediction(stirred, latents, vector, residuals, no_biases)
    both = reference_prediction(stirred, latents, prompt, residuals, biases)
    assert (nothing - pose).abs().max() > 1e-2
    assert (pose - both).abs().max() > 1e-2

    for scales in ((1.0, 1.0), (1.0, 2.0), (2.0, 1.0), (2.0, 2.0), (3.0, 1.5)):
        expected = nothing + scales[0] * (pose - nothing) + scales[1] * (both - pose)
        guided = guide(stirred, conditioning, cumulative_terms(*scales))
        found = guided_prediction(stirred, latents, TIMESTEP, guided)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_attention_is_equation_4():
    torch.manual_seed(0)
    layer = Attention(query_dim=12, cross_attention_dim=6, heads=1, dim_head=4)
    hidden, prompt, bias = torch.randn(2, 9, 12), torch.randn(2, 5, 6), torch.randn(2, 9, 4)
    query = hidden @ layer.to_q.weight.T
    key, value = prompt @ layer.to_k.weight.T, prompt @ layer.to_v.weight.T
    weights = torch.softmax((query + bias) @ key.transpose(1, 2) / 4**0.5, dim=-1)
    expected = weights @ value @ layer.to_out[0].weight.T + layer.to_out[0].bias
    for attention in ("sdpa", "plain"):
        layer.set_processor(LayerAttention(attention, "queries", prompt_index=0, bias_index=0))
        found = layer(hidden, prompt, appearance_biases=(bias,))
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_strategies_are_those_of_table_5():
    conditions = {
        name: [(term.prompt, term.pose, term.appearance, term.weight) for term in terms]
        for name, terms in STRATEGIES.items()
    }
    nothing, pose, everything = (False, False, False), (False, True, False), (True, True, True)
    assert conditions == {
        "none": [(*everything, 1.0)],
        "appearance": [(*pose, -1.0), (*everything, 2.0)],
        "pose": [(*nothing, -1.0), (*pose, 1.0), (*everything, 1.0)],
        "cumulative": [(*nothing, -1.0), (*everything, 2.0)],
    }


@pytest.mark.parametrize("terms", STRATEGIES.values())
def test_weights_sum_to_one(terms):
    assert sum(term.weight for term in terms) == pytest.approx(1)


@torch.no_grad()
def test_terms_run_in_one_batch_and_any_table_works(stirred, batch, conditioning):
    calls = []
    stirred.unet.register_forward_pre_hook(lambda _, inputs: calls.append(len(inputs[0])))
    terms = (
        Term(prompt=True, pose=False, appearance=False, weight=0.25),
        Term(prompt=False, pose=False, appearance=True, weight=0.75),
    )
    guided = guide(stirred, conditioning, terms)
    latents = batch.latents[:2]
    before = latents.clone()
    first = guided_prediction(stirred, latents, TIMESTEP, guided)
    second = guided_prediction(stirred, latents, TIMESTEP, guided)
    assert calls == [4, 4]
    assert torch.equal(first, second)
    assert torch.equal(latents, before)
    assert first.dtype == latents.dtype
