import subprocess
import sys
from dataclasses import asdict, fields, replace

import pytest
import torch
from omegaconf import OmegaConf

from cfld.appearance import AppearanceConfig
from cfld.config import PARTS, PRESETS, CFLDConfig
from cfld.model import CFLD
from cfld.source_encoder import SourceEncoderConfig

TINY = PRESETS["tiny"]


def count(module, only_trainable=False):
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not only_trainable)


def gradients(model, batch):
    model.zero_grad()
    model(batch).mean.backward()
    return {name: p.grad for name, p in model.named_parameters()}


@pytest.fixture(scope="module")
def paper() -> CFLD:
    with torch.device("meta"):
        return CFLD(PRESETS["paper"], pretrained=False)


def test_paper_has_the_parameters_of_table_1(paper):
    # CFLD Table 1 in millions, and the counts measured on the authors' code.
    for part, millions, exact in (
        ("source_encoder", 87.0, 86_991_864),
        ("appearance", 22.5, 22_549_632),
        ("prompt_decoder", 97.7, 97_712_128),
        ("pose_adapter", 30.6, 30_636_480),
        ("unet", 10.3, 10_321_920),
    ):
        assert count(getattr(paper, part), only_trainable=True) == exact
        assert round(exact / 1e6, 1) == millions
    assert count(paper, only_trainable=True) == 248_224_312
    assert count(paper.unet) == 859_520_964
    assert count(CFLD(TINY)) == 7_529_171


def test_paper_trains_exactly_eighteen_weights_of_the_unet(paper):
    trained = {name for name, p in paper.unet.named_parameters() if p.requires_grad}
    assert trained == {
        f"up_blocks.{block}.attentions.{layer}.transformer_blocks.0.attn2.{projection}.weight"
        for block in (1, 2, 3)
        for layer in (0, 1, 2)
        for projection in ("to_k", "to_v")
    }


def test_gradients_reach_exactly_what_trains(stirred, batch):
    for name, gradient in gradients(stirred, batch).items():
        is_trained = stirred.get_parameter(name).requires_grad
        assert (gradient is not None) == is_trained, name
        if is_trained:
            assert gradient.abs().max() > 0, name


def test_zero_convolutions_start_appearance_at_nothing(model, batch):
    conditioning = model.condition(batch.source, batch.pose_maps)
    assert all((bias == 0).all() for bias in conditioning.appearance_biases)

    def moved() -> set[str]:
        return {
            name.split(".")[3]
            for name, gradient in gradients(model, batch).items()
            if name.startswith("appearance.branches.") and gradient.any()
        }

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    # The first gradient stops at conv_out, which is zero; what follows depends on it.
    # (measured on the authors' code: at that step conv_in and the blocks get exactly 0)
    assert moved() == {"conv_out"}
    optimizer.step()
    assert moved() == {"conv_out", "conv_in", "blocks"}


def test_source_encoder_gets_no_gradient_from_appearance_at_the_start(model, batch):
    features = tuple(
        feature.detach().requires_grad_() for feature in model.source_encoder(batch.source)
    )
    sum(bias.square().sum() + bias.sum() for bias in model.appearance(features)).backward()
    assert all((feature.grad == 0).all() for feature in features[:3])


@torch.no_grad()
def test_several_poses_of_one_source_equal_one_at_a_time(stirred, batch):
    together = stirred.condition(batch.source, batch.pose_maps)
    for first in (0, 2):
        alone = stirred.condition(batch.source, batch.pose_maps[first : first + 2])
        rows = together.map(lambda tensor, first=first: tensor[first : first + 2])
        torch.testing.assert_close(asdict(rows), asdict(alone), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_prediction_is_deterministic_and_leaves_its_inputs_alone(stirred, batch):
    conditioning = stirred.condition(batch.source, batch.pose_maps)
    before = asdict(conditioning.map(torch.clone))
    timesteps = torch.tensor([1, 500, 999, 3])
    first = stirred.predict(batch.latents, timesteps, conditioning)
    second = stirred.predict(batch.latents, timesteps, conditioning)
    assert torch.equal(first, second)
    torch.testing.assert_close(asdict(conditioning), before, atol=0, rtol=0)


@torch.no_grad()
def test_precomputed_keys_and_values_change_nothing(stirred, batch):
    conditioning = stirred.condition(batch.source, batch.pose_maps)
    cached = stirred.precompute_keys_values(conditioning)
    assert len(cached.prompt_keys_values) == 10  # 3 down, 1 mid, 6 up
    timesteps = torch.tensor(500)
    torch.testing.assert_close(
        stirred.predict(batch.latents, timesteps, cached),
        stirred.predict(batch.latents, timesteps, conditioning),
        atol=0,
        rtol=0,
    )


@pytest.mark.parametrize("part", PARTS)
def test_gradient_checkpointing_changes_no_gradient(stirred, batch, part):
    expected = gradients(stirred, batch)
    stirred.set_gradient_checkpointing([part])
    for name, gradient in gradients(stirred, batch).items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-5, rtol=1e-4, msg=name)


def test_both_attention_kernels_agree(build, frozen_config, batch):
    losses = [
        build(replace(frozen_config, attention=attention), stirred=True)(batch).rows
        for attention in ("sdpa", "plain")
    ]
    torch.testing.assert_close(*losses, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("attention", ["sdpa", "plain"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_near_full(build, frozen_config, batch, dtype, attention):
    model = build(replace(frozen_config, attention=attention), stirred=True)
    expected = model(batch).rows
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model(batch).rows, expected, atol=0.05, rtol=0.05)
    half = model.to(dtype).to(memory_format=torch.channels_last)
    losses = half(batch)
    assert losses.mean.dtype == torch.float32
    torch.testing.assert_close(losses.rows, expected, atol=0.05, rtol=0.05)


def ablation(prompt: str, biases: str, trained=("to_k", "to_v")) -> CFLDConfig:
    return replace(
        TINY,
        prompt_decoder=replace(TINY.prompt_decoder, kind=prompt),
        appearance=replace(TINY.appearance, biases=biases),
        unet=replace(TINY.unet, is_frozen=True, trained=trained),
    )


@pytest.mark.parametrize(
    ("config", "num_tokens", "num_trained"),
    [
        pytest.param(ablation("empty", "context"), 4, 12, id="B1"),
        pytest.param(ablation("refined", "nothing"), 16, 12, id="B3"),
        pytest.param(ablation("refined", "nothing", ("to_q", "to_k", "to_v")), 16, 18, id="B4"),
        pytest.param(ablation("features", "queries"), 4, 12, id="B5"),
    ],
)
def test_ablations_of_table_3_train(build, batch, config, num_tokens, num_trained):
    model = build(config, stirred=config.appearance.biases != "nothing")
    assert sum(p.requires_grad for p in model.unet.parameters()) == num_trained
    conditioning = model.condition(batch.source, batch.pose_maps)
    assert conditioning.prompt.shape == (4, num_tokens, 128)
    found = gradients(model, batch)
    unreached = {n for n, g in found.items() if g is not None and not g.any()}
    assert not {n for n in unreached if not n.startswith("source_encoder.swin.layers.3")}
    cached = model.precompute_keys_values(conditioning)
    timestep = torch.tensor(7)
    torch.testing.assert_close(
        model.predict(batch.latents, timestep, cached),
        model.predict(batch.latents, timestep, conditioning),
    )


def test_clip_prompt_needs_transformers_or_trains(build, batch):
    config = ablation("clip", "nothing")
    try:
        import transformers  # noqa: F401 - only whether it is there
    except ImportError:
        with pytest.raises(ImportError, match=r"pip install cfld\[clip\]"):
            CFLD(config, pretrained=False)
    else:
        model = build(config)
        assert model.source_encoder is None
        assert model.condition(batch.source, batch.pose_maps).prompt.shape == (4, 1, 128)


def test_other_source_sizes_set_all_other_sizes(build):
    config = replace(TINY, source_encoder=replace(TINY.source_encoder, image_size=(96, 64)))
    assert (config.latent_size, config.image_size, config.pose_map_size) == (
        (24, 16),
        (96, 64),
        (96, 64),
    )
    model = build(config, stirred=True)
    conditioning = model.condition(torch.rand(1, 3, 96, 64), torch.rand(1, 21, 96, 64))
    latents = torch.randn(1, 48, 24, 16)
    assert model.predict(latents, torch.tensor(3), conditioning).shape == latents.shape


def test_sizes_that_do_not_fit_are_refused(model, batch):
    with pytest.raises(ValueError, match=r"source image of \(96, 64\) does not fit: resize it to"):
        model.condition(torch.zeros(1, 3, 96, 64), batch.pose_maps[:1])
    with pytest.raises(ValueError, match=r"pose map of \(64, 32\) do not fit.*\(64, 64\)"):
        model.condition(batch.source[:1], torch.zeros(1, 21, 64, 32))
    with pytest.raises(ValueError, match="3 pose maps for 2 source images"):
        model.condition(batch.source, batch.pose_maps[:3])
    conditioning = model.condition(batch.source[:1], batch.pose_maps[:1])
    with pytest.raises(ValueError, match=r"latents of \(8, 16\) do not fit.*\(16, 16\)"):
        model.predict(torch.zeros(1, 48, 8, 16), torch.tensor(1), conditioning)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda: CFLDConfig(attention="flash"), "attention is 'flash'; choose one of"),
        (lambda: CFLDConfig(gradient_checkpointing=("vae",)), r"has \['vae'\]; choose among"),
        (lambda: CFLDConfig(appearance=AppearanceConfig(widths=(64, 128))), "needs as many stages"),
        (
            lambda: CFLDConfig(
                source_encoder=SourceEncoderConfig(
                    image_size=(272, 256), depths=(2, 2, 2), num_heads=(4, 8, 16)
                )
            ),
            r"latents of \(68, 64\) do not fit 3 halvings",
        ),
    ],
)
def test_settings_that_contradict_each_other_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        change()


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_survive_omegaconf(preset):
    merged = OmegaConf.merge(OmegaConf.structured(PRESETS[preset]), {"attention": "sdpa"})
    loaded = OmegaConf.to_object(merged)
    assert [field.name for field in fields(loaded)] == [field.name for field in fields(CFLDConfig)]
    assert loaded == replace(PRESETS[preset], attention="sdpa")
    with torch.device("meta"):
        CFLD(loaded, pretrained=False)


COMPILE = """
import torch
from cfld.config import PRESETS
from cfld.model import CFLD

torch.set_grad_enabled(False)
model = CFLD(PRESETS["tiny"], pretrained=False).eval()
conditioning = model.condition(torch.rand(1, 3, 64, 64), torch.rand(2, 21, 64, 64))
conditioning = model.precompute_keys_values(conditioning)
latents, timesteps = torch.randn(2, 48, 16, 16), torch.tensor([1, 500])
expected = model.predict(latents, timesteps, conditioning)
model.unet.compile(fullgraph=True, backend="aot_eager")
compiled = model.predict(latents, timesteps, conditioning)
torch.testing.assert_close(compiled, expected, atol=1e-4, rtol=1e-4)
"""


@pytest.mark.slow
def test_unet_compiles_without_a_graph_break():
    # In a process of its own, because torch cannot trace the checks of shapes that tests add. The
    # whole graph is traced; generating C++ for it would take minutes and test only torch.
    subprocess.run([sys.executable, "-c", COMPILE], check=True, timeout=500)
