"""Counting skipped steps, naming pairs, and the signal to stop."""

import os
import signal

import pytest

from train.health import HealthConfig, SkipCounter, StopSignal, TooManySkippedError, describe_pairs


def test_only_skips_in_a_row_end_a_run() -> None:
    counter = SkipCounter(HealthConfig(max_skipped=3))
    for step, was_applied in enumerate([False, False, True, False, False]):
        counter.count(step, was_applied)
    assert counter.total == 4
    with pytest.raises(TooManySkippedError, match=r"step 5: 3 steps in a row .* engine.precision"):
        counter.count(5, False)


def test_only_the_first_pairs_are_named() -> None:
    pairs = [(f"a{number}", f"b{number}") for number in range(10)]
    assert describe_pairs(pairs[:2]) == "a0 > b0, a1 > b1"
    assert describe_pairs(pairs).endswith("a7 > b7 and 2 more")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_signal_is_noticed_and_given_back(number) -> None:
    before = signal.getsignal(number)
    stop = StopSignal()
    assert not stop.is_set
    os.kill(os.getpid(), number)
    assert stop.is_set
    stop.close()
    assert signal.getsignal(number) == before


def test_a_second_interruption_is_an_interruption() -> None:
    stop = StopSignal()
    os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
    stop.close()
