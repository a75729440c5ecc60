"""The learning rate at the steps that matter."""

from functools import partial

import pytest

from train.schedule import ScheduleConfig, learning_rate_factor

factor = partial(learning_rate_factor, steps_per_epoch=455, num_steps=45500)


def test_the_papers_warm_up_and_drop() -> None:
    paper = ScheduleConfig()
    assert factor(paper, 0) == pytest.approx(0.1)
    assert factor(paper, 500) == pytest.approx(0.55)
    assert factor(paper, 1000) == factor(paper, 50 * 455 - 1) == 1
    assert factor(paper, 50 * 455) == factor(paper, 45499) == pytest.approx(0.1)


def test_several_drops_multiply() -> None:
    config = ScheduleConfig(warmup_steps=0, drop_epochs=(1, 3), drop_factor=0.5)
    assert [factor(config, epoch * 455) for epoch in range(4)] == [1, 0.5, 0.5, 0.25]


def test_cosine_falls_from_the_warm_up_to_its_end() -> None:
    config = ScheduleConfig(kind="cosine", warmup_steps=100, final=0.02)
    values = [factor(config, step) for step in range(100, 45501)]
    assert values[0] == 1
    assert values[-1] == pytest.approx(0.02)
    assert values == sorted(values, reverse=True)
    assert factor(config, 50000) == pytest.approx(0.02)


def test_constant_stays() -> None:
    config = ScheduleConfig(kind="constant", warmup_steps=0)
    assert {factor(config, step) for step in (0, 1, 45499)} == {1}
