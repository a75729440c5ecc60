import numpy as np
import pytest

from cfld.checks import check_choice, check_counts, check_multiples, check_scales


@pytest.mark.parametrize(
    ("check", "message"),
    [
        (lambda: check_counts(steps=2, height=32.5), "height is 32.5; give a whole number"),
        (lambda: check_counts(steps=None), "steps is None; give a whole number, at least 1"),
        (lambda: check_counts(depths=(2, 0)), r"depths is \(2, 0\); give whole numbers, at least"),
        (lambda: check_counts(depths=()), r"depths is \(\); give whole numbers, at least 1"),
        (lambda: check_scales(pose=1, appearance=None), "appearance is None; give a finite"),
        (lambda: check_scales(pose=float("nan")), "pose is nan; give a finite number"),
        (lambda: check_choice("kind", "c", ("a", "b")), r"kind is 'c'; choose one of \['a', 'b'\]"),
        (lambda: check_multiples("width", 9, "heads", 2), "width is 9; give multiples of heads, 2"),
        (
            lambda: check_multiples("widths", (4, 6), "heads", (2, 4)),
            r"widths is \(4, 6\); give multiples of heads, \(2, 4\)",
        ),
    ],
)
def test_what_does_not_fit_is_named(check, message):
    with pytest.raises(ValueError, match=message):
        check()


def test_what_fits_passes():
    check_counts(steps=np.int64(3), depths=[1, 2])
    check_scales(pose=np.float32(-1.5), appearance=2)
    check_choice("kind", "a", {"a": 1})
    check_multiples("widths", [4, 8], "heads", (2, 8))
