"""Random numbers keyed by (seed, draw): the same on any rank, worker, device and batch."""

from __future__ import annotations

import math
from enum import IntEnum

import torch
from jaxtyping import Float, Int
from torch import Tensor

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_NUM_ROUNDS = 10

Words = tuple[Tensor, Tensor, Tensor, Tensor]


class Stream(IntEnum):
    """What numbers are for; streams of the same draw are independent. Values are kept for ever."""

    FLIP = 0
    NOISE = 1
    POSTERIOR = 2
    TIMESTEP = 3
    DROPOUT = 4


def uniforms_for(
    draws: Int[Tensor, " pairs"], num: int, *, seed: int, stream: Stream
) -> Float[Tensor, "pairs {num}"]:
    """Return `num` uniform numbers in [0, 1) for each draw, on the draws' device."""
    words = torch.stack(_words(draws, -(-num // 4), seed, stream), dim=-1)
    return ((words.flatten(1)[:, :num] >> 8) * 2.0**-24).to(torch.float32)


def noise_for(
    draws: Int[Tensor, " pairs"],
    shape: tuple[int, ...],
    *,
    seed: int,
    stream: Stream = Stream.NOISE,
) -> Float[Tensor, "pairs ..."]:
    """Return standard normal noise of `shape` for each draw, on the draws' device.

    Box-Muller over counter-based bits: up to rounding in log and cos, CPU and GPU agree.
    """
    num = math.prod(shape)
    radii, angles = [], []
    words = _words(draws, -(-num // 4), seed, stream)
    for radius, angle in (words[:2], words[2:]):
        radii.append(torch.sqrt(-2 * torch.log((radius + 1).to(torch.float32) * 2.0**-32)))
        angles.append((angle >> 8).to(torch.float32) * (2 * math.pi * 2.0**-24))
    radius, angle = torch.cat(radii, dim=1), torch.cat(angles, dim=1)
    normals = torch.cat([radius * torch.cos(angle), radius * torch.sin(angle)], dim=1)
    return normals[:, :num].reshape(len(draws), *shape)


def philox(counter: Words, key: tuple[int, int]) -> Words:
    """Return four random 32-bit words for each 128-bit counter; all words are in int64 tensors.

    Source: Philox4x32-10 of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (2011).
    """
    a, b, c, d = counter
    k0, k1 = key
    for _ in range(_NUM_ROUNDS):
        # The 64-bit product wraps into the sign bit; shift and mask give its halves all the same.
        left, right = a * _MULTIPLIERS[0], c * _MULTIPLIERS[1]
        a, b, c, d = (
            (right >> 32 & _WORD) ^ b ^ k0,
            right & _WORD,
            (left >> 32 & _WORD) ^ d ^ k1,
            left & _WORD,
        )
        k0, k1 = (k0 + _KEY_STEPS[0]) & _WORD, (k1 + _KEY_STEPS[1]) & _WORD
    return a, b, c, d


def _words(draws: Int[Tensor, " pairs"], num_blocks: int, seed: int, stream: Stream) -> Words:
    """Return four words for each of `num_blocks` counters of each draw: [pairs, num_blocks]."""
    draws = draws.to(torch.int64)[:, None]
    block = torch.arange(num_blocks, device=draws.device)[None]
    counter = (block, torch.full_like(block, stream), draws & _WORD, draws >> 32 & _WORD)
    return philox(counter, (seed & _WORD, seed >> 32 & _WORD))
