import pytest
import torch

from cfld.config import PRESETS
from cfld.objective import build_scheduler
from cfld.schedulers import compatible_schedulers, short_name


@pytest.mark.parametrize("preset", PRESETS)
def test_all_that_fit_have_the_same_noise_schedule_and_take_the_predictions(preset):
    saved = build_scheduler(PRESETS[preset].diffusion)
    state = torch.random.get_rng_state()
    found = compatible_schedulers(saved)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert {"ddim", "ddpm", "ddimparallel", "eulerdiscrete", "lcm", "tcd"} <= found.keys()
    for name, scheduler_class in found.items():
        scheduler = scheduler_class.from_config(saved.config)
        alphas = scheduler.alphas_cumprod.float()
        torch.testing.assert_close(alphas, saved.alphas_cumprod, rtol=0, atol=1e-6, msg=name)
        scheduler.set_timesteps(12)
        latents = torch.ones(1, 1, 1, 1)
        for timestep in scheduler.timesteps:
            scaled = scheduler.scale_model_input(latents, timestep)
            latents = scheduler.step(scaled, timestep, latents).prev_sample
        assert torch.isfinite(latents).all(), name


def test_what_does_not_fit_is_left_out():
    paper, tiny = (
        compatible_schedulers(build_scheduler(PRESETS[preset].diffusion))
        for preset in ("paper", "tiny")
    )
    strangers = {"edmeuler", "flowmatcheulerdiscrete", "cogvideoxddim", "ddiminverse", "repaint"}
    assert not strangers & (paper.keys() | tiny.keys())
    # They know no zero terminal SNR, or no prediction of the clean latents.
    assert {"pndm", "sasolver", "deismultistep", "eulerancestraldiscrete"} <= paper.keys()
    assert not {"pndm", "sasolver", "deismultistep", "eulerancestraldiscrete"} & tiny.keys()


def test_short_names():
    assert short_name("DDIMScheduler") == short_name("DDIM") == short_name("ddim") == "ddim"
