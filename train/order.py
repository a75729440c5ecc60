"""The order of training: the pairs of every global batch, from index, seed and epoch alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int, UInt64

# Far above the passes of any run, so that a draw that fills a batch equals no ordinary one.
_FILL_PASSES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class OrderConfig:
    """What defines the order beside the shard sets; not ranks, workers or micro-batch."""

    global_batch: int
    """Pairs of one optimizer step, over all ranks."""
    seed: int = 0
    block_shards: int = 16
    """Shards of each set whose pairs are shuffled together: a remote run holds two such blocks."""
    fill_last: bool = False
    """Fill an epoch's last batch with pairs of that epoch instead of dropping it."""

    def __post_init__(self) -> None:
        for name in ("global_batch", "block_shards"):
            if getattr(self, name) < 1:
                raise ValueError(f"order.{name} is {getattr(self, name)}, it must be positive")
        if not 0 <= self.seed < 1 << 63:
            raise ValueError(f"order.seed is {self.seed}, it must lie in [0, 2^63)")


@dataclass(frozen=True, kw_only=True)
class PairSet:
    """What the order needs to know of a shard set: the shard of every pair, and the set's weight.

    A set of n pairs gives round(weight * n) draws to an epoch. They continue where the previous
    epoch stopped in an endless row of passes, each of which holds every pair once: weight 2 shows
    all pairs twice, weight 1/4 shows all of them once in four epochs.
    """

    shards: Int[np.ndarray, " pairs"]
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.weight < float("inf"):
            raise ValueError(f"a shard set's weight is {self.weight}, it must be positive")

    @property
    def num_draws(self) -> int:
        """Draws per epoch."""
        return round(self.weight * len(self.shards))


def num_steps(sets: Sequence[PairSet], config: OrderConfig) -> int:
    """Count the global batches of an epoch.

    Raises:
        ValueError: If there is not one.
    """
    num_draws = sum(pairs.num_draws for pairs in sets)
    steps = num_draws // config.global_batch
    if config.fill_last and num_draws % config.global_batch:
        steps += 1
    if num_draws == 0:
        raise ValueError("an epoch has no pairs; check the shard sets' split and weight")
    if steps == 0:
        raise ValueError(
            f"an epoch has {num_draws} pairs, less than one global batch of "
            f"{config.global_batch}; lower order.global_batch or set order.fill_last"
        )
    return steps


def epoch_order(
    sets: Sequence[PairSet], config: OrderConfig, epoch: int
) -> Int[np.ndarray, "steps {config.global_batch}"]:
    """Return the draws of an epoch, a row per global batch.

    A draw is a pair at one of its occurrences: pass * (pairs of all sets) + pair, where pairs count
    over the sets one after the other. It never repeats within a run and so keys the pair's
    randomness (`train/randomness.py`); `pairs_of` takes the pair from it.

    Shards are shuffled and cut into blocks, pairs are shuffled within a block, and several sets
    are merged at random, each in its own order.
    """
    total = sum(len(pairs.shards) for pairs in sets)
    rows, first_pair = [], 0
    for number, pairs in enumerate(sets):
        passes, places = _passes(pairs, config, number, epoch)
        rows.append(passes * total + first_pair + places)
        first_pair += len(pairs.shards)
    draws = _merge(rows, np.random.SeedSequence((config.seed, epoch)))
    length = num_steps(sets, config) * config.global_batch
    if length > len(draws):
        turn, place = np.divmod(np.arange(len(draws), length), len(draws))
        draws = np.concatenate([draws, draws[place] + turn * _FILL_PASSES * total])
    return draws[:length].reshape(-1, config.global_batch)


def pairs_of(
    draws: Int[np.ndarray, "*shape"], sets: Sequence[PairSet]
) -> Int[np.ndarray, "*shape"]:
    """Return the pair of each draw, counted over the sets one after the other."""
    return draws % sum(len(pairs.shards) for pairs in sets)


def accumulation_steps(global_batch: int, micro_batch: int, num_ranks: int) -> int:
    """Work out how many micro-batches a rank accumulates for one global batch.

    Raises:
        ValueError: If global batch = micro-batch x accumulation x ranks has no whole solution.
    """
    if global_batch % num_ranks:
        raise ValueError(
            f"global batch {global_batch} cannot be split evenly over {num_ranks} ranks; "
            f"choose one that {num_ranks} divides, such as "
            f"{max(1, round(global_batch / num_ranks)) * num_ranks}"
        )
    share = global_batch // num_ranks
    if micro_batch < 1 or share % micro_batch:
        raise ValueError(
            f"micro-batch {micro_batch} does not divide the {share} pairs that each of "
            f"{num_ranks} ranks has of global batch {global_batch}; choose one of "
            f"{[size for size in range(1, share + 1) if share % size == 0]}"
        )
    return share // micro_batch


def micro_batches(
    draws: Int[np.ndarray, " global_batch"], micro_batch: int, rank: int, num_ranks: int
) -> Int[np.ndarray, "accumulation {micro_batch}"]:
    """Return a rank's slice of a global batch, a row per micro-batch."""
    accumulation_steps(len(draws), micro_batch, num_ranks)
    share = len(draws) // num_ranks
    return draws[rank * share : (rank + 1) * share].reshape(-1, micro_batch)


def _passes(
    pairs: PairSet, config: OrderConfig, number: int, epoch: int
) -> tuple[Int[np.ndarray, " draws"], Int[np.ndarray, " draws"]]:
    """Cut an epoch's draws out of a set's endless row of passes: the pass and the pair of each."""
    size, first = len(pairs.shards), epoch * pairs.num_draws
    last = first + pairs.num_draws
    rows = [
        (index, _block_shuffle(pairs.shards, config, (number, index)))
        for index in range(first // max(size, 1), -(-last // max(size, 1)))
    ]
    if not rows:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    cut = slice(first - rows[0][0] * size, last - rows[0][0] * size)
    passes = np.repeat(np.array([index for index, _ in rows], np.int64), size)
    return passes[cut], np.concatenate([order for _, order in rows])[cut]


def _block_shuffle(
    shards: Int[np.ndarray, " pairs"], config: OrderConfig, key: tuple[int, int]
) -> Int[np.ndarray, " pairs"]:
    """Shuffle pairs within blocks of shards that were put together at random."""
    # (seed, epoch) merges the sets; the 1 keeps these streams apart from those.
    bits = np.random.Philox(np.random.SeedSequence((config.seed, *key, 1)))
    names, shard = np.unique(shards, return_inverse=True)
    block = np.argsort(np.argsort(_random(bits, len(names)))) // config.block_shards
    return np.lexsort((_random(bits, len(shards)), block[shard]))


def _merge(
    rows: Sequence[Int[np.ndarray, " _"]], seed: np.random.SeedSequence
) -> Int[np.ndarray, " merged"]:
    """Merge rows at random places, each row keeping its order."""
    if len(rows) == 1:
        return rows[0]
    owner = np.repeat(np.arange(len(rows)), [len(row) for row in rows])
    owner = owner[np.argsort(_random(np.random.Philox(seed), len(owner)), kind="stable")]
    merged = np.empty(len(owner), np.int64)
    for number, row in enumerate(rows):
        merged[owner == number] = row
    return merged


def _random(bits: np.random.Philox, num: int) -> UInt64[np.ndarray, " num"]:
    # Raw bits are the same in every numpy version; what Generator makes of them need not be.
    return np.asarray(bits.random_raw(num), np.uint64)
