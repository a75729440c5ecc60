"""What the dry run says."""

import pytest

from train.config import load_train_config
from train.plan import make_plan


@pytest.mark.slow
def test_the_plan_works_everything_out(runs) -> None:
    config = load_train_config(runs.config, ["epochs=3", "steps=null", "engine.precision=bf16"])
    plan = make_plan(config, 2)
    assert "drawn: 72 pairs of drawn, split train, weight 1" in plan
    assert "12 = micro-batch 3 x accumulation 2 x ranks 2" in plan
    assert "18 = 3.0 epochs of 6" in plan
    assert "up to 0.0012, cosine after 2 steps" in plan
    assert "latents        made in every step" in plan
    assert '"gradient_accumulation_steps": 2' in plan
    assert next(line for line in plan.splitlines() if "this run" in line).split()[0] == "3"


def test_ranks_that_do_not_fit_are_refused(runs) -> None:
    with pytest.raises(ValueError, match=r"global batch 12 cannot be split evenly over 5 ranks"):
        make_plan(load_train_config(runs.config), 5)
