"""The order is a permutation per epoch, independent of ranks, local in shards, and mixes sets."""

import numpy as np
import pytest

from train.order import (
    OrderConfig,
    PairSet,
    accumulation_steps,
    epoch_order,
    micro_batches,
    num_steps,
    pairs_of,
)

SHARDS = np.repeat(np.arange(30), 40)  # 1200 pairs
SETS = [PairSet(shards=SHARDS)]
CONFIG = OrderConfig(global_batch=24, seed=7, block_shards=4)


def pairs_in(epoch: int, sets=SETS, config=CONFIG) -> np.ndarray:
    return pairs_of(epoch_order(sets, config, epoch), sets).reshape(-1)


@pytest.mark.parametrize("epoch", [0, 1, 5])
def test_each_pair_occurs_once_per_epoch(epoch: int) -> None:
    np.testing.assert_array_equal(np.sort(pairs_in(epoch)), np.arange(1200))


def test_epochs_and_seeds_differ_and_repeat_exactly() -> None:
    orders = [pairs_in(epoch) for epoch in (0, 1, 5)]
    orders.append(pairs_in(0, config=OrderConfig(global_batch=24, seed=8, block_shards=4)))
    for number, order in enumerate(orders):
        for other in orders[number + 1 :]:
            assert (order == other).mean() < 0.05
    np.testing.assert_array_equal(pairs_in(5), orders[2])


def test_order_is_the_same_on_every_machine() -> None:
    """Recorded when the order was defined: a change would break the resume of running jobs."""
    recorded = [545, 980, 535, 521, 974, 505, 1010, 550]
    assert epoch_order(SETS, CONFIG, 0)[0, :8].tolist() == recorded


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4, 6, 8])
@pytest.mark.parametrize("accumulation", [1, 3])
def test_ranks_and_micro_batches_together_are_the_global_batch(
    num_ranks: int, accumulation: int
) -> None:
    batch = epoch_order(SETS, OrderConfig(global_batch=72), 1)[3]
    micro = 72 // num_ranks // accumulation
    slices = [micro_batches(batch, micro, rank, num_ranks) for rank in range(num_ranks)]
    assert all(part.shape == (accumulation, micro) for part in slices)
    np.testing.assert_array_equal(np.concatenate(slices).reshape(-1), batch)


def test_a_global_batch_is_the_same_whatever_it_is_cut_into() -> None:
    """Another global batch size cuts the same row of pairs elsewhere."""
    wide = epoch_order(SETS, OrderConfig(global_batch=48, seed=7, block_shards=4), 2)
    np.testing.assert_array_equal(wide.reshape(-1), epoch_order(SETS, CONFIG, 2).reshape(-1))


def test_pairs_of_one_block_of_shards_come_together() -> None:
    shards = SHARDS[pairs_in(0)]
    blocks = [set(block) for block in np.split(shards, range(160, 1200, 160))]
    assert [len(block) for block in blocks] == [4] * 7 + [2]
    assert len(set.union(*blocks)) == 30
    assert all(len(set(window)) <= 8 for window in np.lib.stride_tricks.sliding_window_view(
        shards, 160)[:-80])  # fmt: skip
    # Within a block, pairs are well mixed: any quarter of it touches every shard.
    assert all(len(set(quarter)) == 4 for quarter in np.split(shards[:1120], 28))


def test_blocks_differ_between_epochs() -> None:
    blocks = [
        {frozenset(block) for block in np.split(SHARDS[pairs_in(epoch)], range(160, 1200, 160))}
        for epoch in (0, 1)
    ]
    assert len(blocks[0] & blocks[1]) <= 1


def test_draws_never_repeat_in_a_run() -> None:
    sets = [PairSet(shards=SHARDS, weight=1.7), PairSet(shards=np.zeros(50, int), weight=3.0)]
    config = OrderConfig(global_batch=64, fill_last=True)
    draws = np.concatenate([epoch_order(sets, config, epoch).reshape(-1) for epoch in range(6)])
    assert len(np.unique(draws)) == len(draws)
    assert draws.min() >= 0


@pytest.mark.parametrize("weight", [0.25, 0.3, 1.0, 1.5, 2.0])
def test_weights_set_how_often_pairs_occur_evenly(weight: float) -> None:
    sets = [PairSet(shards=SHARDS, weight=weight)]
    config = OrderConfig(global_batch=1, block_shards=4)
    counts = np.zeros(1200, int)
    for epoch in range(1, 8):
        order = pairs_in(epoch - 1, sets, config)
        assert len(order) == round(weight * 1200)
        counts += np.bincount(order, minlength=1200)
        assert counts.max() - counts.min() <= 1, "without replacement, over epochs as well"
        assert counts.sum() == epoch * round(weight * 1200)


def test_a_fraction_takes_another_part_in_the_next_epoch() -> None:
    sets = [PairSet(shards=SHARDS, weight=0.5)]
    config = OrderConfig(global_batch=24)
    first, second = (set(pairs_in(epoch, sets, config)) for epoch in (0, 1))
    assert not first & second
    assert len(first | second) == 1200


def test_sets_are_mixed_evenly_through_the_epoch() -> None:
    sets = [PairSet(shards=SHARDS), PairSet(shards=np.full(300, 99), weight=2.0)]
    order = pairs_in(0, sets, OrderConfig(global_batch=100, block_shards=4))
    assert len(order) == 1800
    assert (np.bincount(order)[1200:] == 2).all()
    shares = (order >= 1200).reshape(18, 100).mean(axis=1)
    assert shares.mean() == pytest.approx(1 / 3)
    assert shares.min() > 0.15
    assert shares.max() < 0.55


def test_another_set_does_not_change_the_order_within_a_set() -> None:
    both = [*SETS, PairSet(shards=np.zeros(120, int))]
    order = pairs_in(3, both)
    np.testing.assert_array_equal(order[order < 1200], pairs_in(3))


def test_an_incomplete_batch_is_dropped_or_filled() -> None:
    sets = [PairSet(shards=SHARDS[:50])]
    dropped = OrderConfig(global_batch=24)
    filled = OrderConfig(global_batch=24, fill_last=True)
    assert num_steps(sets, dropped) == 2
    assert num_steps(sets, filled) == 3
    assert len(set(pairs_in(0, sets, dropped))) == 48
    counts = np.bincount(pairs_in(0, sets, filled), minlength=50)
    assert sorted(counts) == [1] * 28 + [2] * 22
    assert num_steps(sets, OrderConfig(global_batch=25, fill_last=True)) == 2


def test_a_set_smaller_than_a_batch_fills_it_several_times() -> None:
    sets = [PairSet(shards=np.zeros(5, int))]
    draws = epoch_order(sets, OrderConfig(global_batch=12, fill_last=True), 4)
    assert draws.shape == (1, 12)
    assert sorted(np.bincount(pairs_of(draws[0], sets))) == [2, 2, 2, 3, 3]
    assert len(np.unique(draws)) == 12


def test_errors_name_what_to_change() -> None:
    with pytest.raises(ValueError, match=r"5 pairs, less than one global batch of 12; lower"):
        num_steps([PairSet(shards=np.zeros(5, int))], OrderConfig(global_batch=12))
    with pytest.raises(ValueError, match="an epoch has no pairs"):
        num_steps([PairSet(shards=np.zeros(5, int), weight=0.01)], OrderConfig(global_batch=1))
    with pytest.raises(ValueError, match=r"weight is 0\.0, it must be positive"):
        PairSet(shards=SHARDS, weight=0.0)
    with pytest.raises(ValueError, match=r"order\.global_batch is 0"):
        OrderConfig(global_batch=0)
    with pytest.raises(ValueError, match=r"order\.block_shards is 0"):
        OrderConfig(global_batch=1, block_shards=0)
    with pytest.raises(ValueError, match=r"order\.seed is -1"):
        OrderConfig(global_batch=1, seed=-1)


def test_accumulation_is_worked_out_and_checked() -> None:
    assert accumulation_steps(24, 2, 3) == 4
    with pytest.raises(ValueError, match=r"24 cannot be split evenly over 5 ranks; .* such as 25"):
        accumulation_steps(24, 2, 5)
    with pytest.raises(ValueError, match=r"micro-batch 5 does not divide the 8 .*\[1, 2, 4, 8\]"):
        accumulation_steps(24, 5, 3)
