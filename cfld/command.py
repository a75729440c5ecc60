"""What the commands share: their parsers, types of options, messages and exit codes."""

from __future__ import annotations

import argparse
import logging
import math
from collections.abc import Callable

import torch

logger = logging.getLogger(__name__)


def run_command(work: Callable[[], int], *bad_input: type[Exception]) -> int:
    """Do a command's work and turn what may go wrong into a message and an exit code.

    2 is for the errors of `bad_input`, found before anything is made; 1 is what failed later.
    """
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("cfld").setLevel(logging.INFO)
    try:
        return work()
    except bad_input as error:
        logger.error("%s", error)
        return 2
    except (ValueError, NotImplementedError, OSError) as error:
        logger.error("stopped: %s", error)
        return 1
    except torch.OutOfMemoryError as error:
        logger.error("out of memory; a smaller --batch-size or --dtype fp16 needs less: %s", error)
        return 1
    except KeyboardInterrupt:
        logger.error("interrupted; run the same command again")
        return 1


def make_parser(name: str, description: str | None, epilog: str) -> argparse.ArgumentParser:
    """A parser for `python -m NAME` whose texts keep their lines."""
    return argparse.ArgumentParser(
        prog=f"python -m {name}",
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def positive(word: str) -> int:
    """A whole number of at least 1."""
    number = int(word)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{word} is not at least 1")
    return number


def not_negative(word: str) -> int:
    """A whole number of at least 0."""
    number = int(word)
    if number < 0:
        raise argparse.ArgumentTypeError(f"{word} is negative")
    return number


def finite(word: str) -> float:
    """A number that is neither infinite nor NaN."""
    number = float(word)
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"{word} is not finite")
    return number


def seed(word: str) -> int:
    """A whole number that seeds torch's generators, also with a table's rows added."""
    number = int(word)
    if not 0 <= number < 2**63:
        raise argparse.ArgumentTypeError(f"{word} is not between 0 and 2^63 - 1")
    return number
