import argparse

import pytest
import torch

from cfld.command import finite, not_negative, positive, run_command, seed


class BadInputError(ValueError):
    pass


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (BadInputError("a.jpg: no such file"), 2, "a.jpg: no such file"),
        (ValueError("does not fit"), 1, "stopped: does not fit"),
        (OSError("disk full"), 1, "stopped: disk full"),
        (torch.OutOfMemoryError("80 GB"), 1, "a smaller --batch-size or --dtype fp16 needs less"),
        (KeyboardInterrupt(), 1, "interrupted; run the same command again"),
    ],
)
def test_what_goes_wrong_is_a_message_and_an_exit_code(error, code, message, caplog):
    def work():
        raise error

    assert run_command(work, BadInputError) == code
    assert message in caplog.text


def test_work_tells_its_own_exit_code():
    assert [run_command(lambda code=code: code) for code in (0, 1)] == [0, 1]


def test_a_mistake_of_ours_is_not_hidden():
    with pytest.raises(ZeroDivisionError, match="division"):
        run_command(lambda: 1 // 0)


@pytest.mark.parametrize(
    ("read", "good", "bad", "message"),
    [
        (positive, "1", "0", "0 is not at least 1"),
        (not_negative, "0", "-1", "-1 is negative"),
        (finite, "-2.5", "inf", "inf is not finite"),
        (finite, "0", "nan", "nan is not finite"),
        (seed, str(2**63 - 1), str(2**63), "is not between 0 and 2\\^63 - 1"),
    ],
)
def test_numbers(read, good, bad, message):
    number = read(good)
    assert number == type(number)(good)
    with pytest.raises(argparse.ArgumentTypeError, match=message):
        read(bad)
