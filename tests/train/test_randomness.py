"""Keyed random numbers: the published generator, independent of the batch, well distributed."""

import pytest
import torch

from train.randomness import Stream, noise_for, philox, uniforms_for

DRAWS = torch.tensor([0, 5, 2**40 + 3, 7])


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_bits_are_those_of_philox(counter, key, expected) -> None:
    """Known answers of the authors' library Random123 (kat_vectors, philox4x32 10)."""
    words = philox(tuple(torch.tensor([word]) for word in counter), key)
    assert tuple(int(word) for word in words) == expected


def test_numbers_do_not_depend_on_the_batch() -> None:
    noise = noise_for(DRAWS, (4, 5, 3), seed=1)
    uniforms = uniforms_for(DRAWS, 6, seed=1, stream=Stream.TIMESTEP)
    for row in (0, 2):
        one = DRAWS[row : row + 1]
        assert torch.equal(noise_for(one, (4, 5, 3), seed=1)[0], noise[row])
        assert torch.equal(
            uniforms_for(one, 6, seed=1, stream=Stream.TIMESTEP)[0], uniforms[row]
        )  # fmt: skip


def test_draws_seeds_and_streams_are_independent() -> None:
    rows = [
        *noise_for(DRAWS, (4096,), seed=1),
        *noise_for(DRAWS[:2], (4096,), seed=2),
        *noise_for(DRAWS[:2], (4096,), seed=1 + 2**32),
        *noise_for(DRAWS[:2], (4096,), seed=1, stream=Stream.POSTERIOR),
    ]
    correlations = torch.corrcoef(torch.stack(rows)) - torch.eye(len(rows))
    assert correlations.abs().max() < 0.06


def test_noise_is_standard_normal() -> None:
    noise = noise_for(torch.arange(64), (4, 64, 64), seed=3)
    assert noise.dtype == torch.float32
    assert abs(noise.mean()) < 3e-3
    assert abs(noise.std() - 1) < 3e-3
    assert abs((noise**4).mean() - 3) < 0.03
    assert abs((noise.abs() < 0.6745).float().mean() - 0.5) < 2e-3


def test_uniforms_are_uniform() -> None:
    uniforms = uniforms_for(torch.arange(1000), 50, seed=3, stream=Stream.DROPOUT)
    assert uniforms.min() >= 0
    assert uniforms.max() < 1
    shares = torch.histc(uniforms, 10, 0, 1) / uniforms.numel()
    assert (shares - 0.1).abs().max() < 5e-3


@pytest.mark.gpu
def test_gpu_agrees_with_cpu() -> None:
    on_gpu = noise_for(DRAWS.cuda(), (4, 64, 64), seed=1)
    torch.testing.assert_close(on_gpu.cpu(), noise_for(DRAWS, (4, 64, 64), seed=1))
