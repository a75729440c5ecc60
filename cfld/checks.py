"""What settings and arguments must be, each by its name: counts, numbers, choices, multiples."""

import math
from collections.abc import Collection, Sequence
from numbers import Integral, Real


def check_counts(**counts: object) -> None:
    """Refuse what is no whole number from 1 on, or no sequence of some.

    Raises:
        ValueError: Naming the first such value.
    """
    for name, count in counts.items():
        entries = count if isinstance(count, (list, tuple)) else (count,)
        if not entries or not all(
            isinstance(each, Integral) and int(each) >= 1 for each in entries
        ):
            what = "whole numbers" if entries is count else "a whole number"
            raise ValueError(f"{name} is {count!r}; give {what}, at least 1")


def check_sizes(part: str, settings: object, *names: str) -> None:
    """Refuse settings of a part that are no counts.

    Raises:
        ValueError: Naming the first such setting.
    """
    check_counts(**{f"{part}.{name}": getattr(settings, name) for name in names})


def check_scales(**scales: object) -> None:
    """Refuse what is no finite number.

    Raises:
        ValueError: Naming the first such value.
    """
    for name, scale in scales.items():
        if not isinstance(scale, Real) or not math.isfinite(scale):
            raise ValueError(f"{name} is {scale!r}; give a finite number")


def check_choice(name: str, value: str, choices: Collection[str]) -> None:
    """Refuse what is not one of the choices.

    Raises:
        ValueError: Naming the value and the choices.
    """
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; choose one of {list(choices)}")


def check_multiples(
    name: str, values: int | Sequence[int], divisor_name: str, divisor: int | Sequence[int]
) -> None:
    """Refuse values that are no multiples of a divisor, or each of its own.

    Raises:
        ValueError: Naming both.
    """
    entries = [values] if isinstance(values, int) else list(values)
    divisors = [divisor] * len(entries) if isinstance(divisor, int) else list(divisor)
    if any(entry % each for entry, each in zip(entries, divisors, strict=True)):
        raise ValueError(f"{name} is {values}; give multiples of {divisor_name}, {divisor}")
