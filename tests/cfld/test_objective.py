from dataclasses import replace

import pytest
import torch
from diffusers import DDPMScheduler

from cfld.conditioning import Conditioning, drop_conditions
from cfld.objective import (
    DiffusionConfig,
    build_scheduler,
    cubic_timesteps,
    draw_rows,
    kept_conditions,
    noised,
    regression_targets,
    squared_errors,
    uniform_timesteps,
)

PAPER = DiffusionConfig()


def test_cubic_timesteps_have_the_measured_distribution():
    u = torch.rand(100_000, generator=torch.Generator().manual_seed(0))
    timesteps = cubic_timesteps(u, 1000)
    assert timesteps.min() >= 0
    assert timesteps.max() == 999
    # P(t >= k) = (1 - k / 1000)^(1/3); mean and quantiles as measured on the authors' code.
    assert timesteps.float().mean() == pytest.approx(749.7, abs=3)
    quantiles = timesteps.float().quantile(torch.tensor([0.05, 0.25, 0.5, 0.75]))
    torch.testing.assert_close(quantiles, torch.tensor([142.0, 580, 874, 984]), atol=8, rtol=0)
    assert (timesteps == 999).float().mean() == pytest.approx(0.1, abs=0.005)
    assert cubic_timesteps(torch.tensor([0.0, 1.0]), 1000).tolist() == [999, 0]


def test_uniform_timesteps_are_uniform():
    u = (torch.arange(1000) + 0.5) / 1000
    assert uniform_timesteps(u, 1000).tolist() == list(range(1000))


def test_noise_schedule_is_stable_diffusions():
    alphas = build_scheduler(PAPER).alphas_cumprod
    # Measured on the authors' code.
    found = alphas[[0, 1, 100, 250, 500, 750, 999]]
    expected = [0.99915, 0.998296, 0.894223, 0.673792, 0.276332, 0.05617, 0.00466]
    torch.testing.assert_close(found, torch.tensor(expected), atol=1e-6, rtol=1e-5)
    zero = replace(PAPER, zero_terminal_snr=True, prediction_type="sample")
    last = build_scheduler(zero).alphas_cumprod[-1]
    assert last < 1e-6


def test_noised_is_equation_1_in_float32():
    scheduler = build_scheduler(PAPER)
    latents = torch.randn(3, 4, 2, 2).to(torch.bfloat16)
    noise = torch.randn(3, 4, 2, 2)
    timesteps = torch.tensor([0, 500, 999])
    alpha = scheduler.alphas_cumprod[timesteps].view(3, 1, 1, 1)
    expected = alpha.sqrt() * latents.float() + (1 - alpha).sqrt() * noise
    torch.testing.assert_close(noised(scheduler, latents, noise, timesteps), expected)


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_targets_recover_the_latents(prediction_type):
    scheduler = build_scheduler(replace(PAPER, prediction_type=prediction_type))
    latents, noise = torch.randn(2, 4, 2, 2), torch.randn(2, 4, 2, 2)
    timesteps = torch.tensor([10, 600])
    target = regression_targets(scheduler, latents, noise, timesteps)
    noisy = noised(scheduler, latents, noise, timesteps)
    alpha = scheduler.alphas_cumprod[timesteps].view(2, 1, 1, 1)
    recovered = {
        "epsilon": (noisy - (1 - alpha).sqrt() * target) / alpha.sqrt(),
        "sample": target,
        "v_prediction": alpha.sqrt() * noisy - (1 - alpha).sqrt() * target,
    }[prediction_type]
    torch.testing.assert_close(recovered, latents, atol=1e-5, rtol=1e-4)


def test_an_unknown_prediction_type_has_no_target():
    scheduler = DDPMScheduler(prediction_type="flow")
    latents = torch.zeros(1, 4, 2, 2)
    with pytest.raises(ValueError, match="prediction_type is 'flow'; there are"):
        regression_targets(scheduler, latents, latents, torch.tensor([1]))


def test_losses_are_means_over_rows():
    predicted, targets = torch.randn(4, 3, 2, 2).to(torch.bfloat16), torch.randn(4, 3, 2, 2)
    losses = squared_errors(predicted, targets)
    assert losses.mean.dtype == torch.float32
    expected = ((predicted.float() - targets) ** 2).mean()
    torch.testing.assert_close(losses.mean, expected)
    torch.testing.assert_close(losses.rows.mean(), expected)


def test_draws_of_a_pair_depend_on_its_generator_alone():
    def draw(seeds):
        return draw_rows([torch.Generator().manual_seed(seed) for seed in seeds], (4, 2, 2))

    together, alone = draw([5, 6, 7]), draw([6])
    for name in ("noise", "timesteps", "dropout"):
        rows, own = getattr(together, name), getattr(alone, name)
        assert len(rows) == 6
        # Row 1 is the pair's source-to-source row, row 3 + 1 its source-to-target row.
        assert torch.equal(rows[[1, 4]], own)
        assert not torch.equal(own[0], own[1])


@pytest.mark.parametrize("dropped", [("prompt",), ("prompt", "pose", "appearance")])
def test_dropout_replaces_exactly_what_is_set(dropped):
    config = DiffusionConfig(dropout=0.5, dropped=dropped)
    conditioning = Conditioning(
        prompt=torch.ones(2, 3, 4),
        appearance_biases=(torch.ones(2, 5, 6),),
        pose_residuals=(torch.ones(2, 1, 2, 2),),
    )
    vector = torch.full((1, 3, 4), 7.0)
    kept = kept_conditions(config, torch.tensor([0.49, 0.5]))
    result = drop_conditions(conditioning, vector, kept)
    assert result.prompt[:, 0, 0].tolist() == [7, 1]
    gone = 0 if "pose" in dropped else 1
    assert result.pose_residuals[0][:, 0, 0, 0].tolist() == [gone, 1]
    assert result.appearance_biases[0][:, 0, 0].tolist() == [gone, 1]
    assert (conditioning.prompt == 1).all()


def test_a_batch_has_one_loss_that_its_draws_decide(stirred, batch):
    first, second = stirred(batch), stirred(batch)
    assert torch.equal(first.rows, second.rows)
    other = replace(batch, draws=draw_rows([torch.Generator().manual_seed(9)] * 2, (48, 16, 16)))
    assert not torch.equal(first.rows, stirred(other).rows)


def test_loss_of_each_row_is_that_of_the_row_alone(stirred, batch):
    """The same noise, timesteps and conditions, one pair at a time."""
    together = stirred(batch).rows
    for pair in (0, 1):
        rows = [pair, 2 + pair]
        alone = replace(
            batch,
            source=batch.source[pair : pair + 1],
            pose_maps=batch.pose_maps[rows],
            latents=batch.latents[rows],
            draws=replace(
                batch.draws,
                noise=batch.draws.noise[rows],
                timesteps=batch.draws.timesteps[rows],
                dropout=batch.draws.dropout[rows],
            ),
        )
        torch.testing.assert_close(stirred(alone).rows, together[rows], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"timesteps": "linear"}, "timesteps is 'linear'; choose one of"),
        ({"dropped": ("prompt", "text")}, "dropped is .*; choose among"),
        ({"prediction_type": "eps"}, "prediction_type is 'eps'; choose one of"),
        ({"beta_schedule": "cosine"}, "beta_schedule is 'cosine'; choose one of"),
        ({"num_steps": 0}, r"diffusion\.num_steps is 0; give a whole number"),
        ({"zero_terminal_snr": True}, "set diffusion.prediction_type to sample or v_prediction"),
        ({"dropout": 20.0}, r"dropout is 20.0; it must lie in \[0, 1\]"),
    ],
)
def test_unknown_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        DiffusionConfig(**settings)
