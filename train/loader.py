"""The streaming loader: batches in the one order of a run, prepared ahead, resumed at any step."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
from jaxtyping import Int
from torch import Tensor

from cfld.pose import POSE_MAP_SIZE
from train.batch import (
    Batch,
    BatchFiller,
    BatchShape,
    read_latent_shape,
    take_batch,
)
from train.loader_workers import Task, prepare_batches
from train.order import (
    OrderConfig,
    accumulation_steps,
    epoch_order,
    micro_batches,
    num_steps,
    pairs_of,
)
from train.pair_table import PairTable, differences
from train.shard_cache import CacheConfig
from train.shard_files import ShardFiles

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class LoaderConfig:
    """How samples become batches; nothing here changes the order."""

    flip_source: float = 0.5
    """Probability that a pair's source conditioning image, and it alone, is mirrored."""
    use_latents: bool = True
    """Read stored latents, where all images have them, instead of target images."""
    num_workers: int = 2
    """Worker processes of each rank; 0 decodes in a thread of the trainer."""
    prefetch_batches: int = 2
    """Micro-batches that each worker prepares ahead."""
    cache: CacheConfig = field(default_factory=CacheConfig)

    def __post_init__(self) -> None:
        if not 0 <= self.flip_source <= 1:
            raise ValueError(f"loader.flip_source is {self.flip_source}, it must lie in [0, 1]")
        if self.num_workers < 0 or self.prefetch_batches < 1:
            raise ValueError("loader.num_workers must be 0 or more, prefetch_batches 1 or more")


class Loader:
    """An endless iterable over a rank's micro-batches, epoch after epoch.

    Global batches and their pairs depend only on the shard sets and the order's configuration
    (`train/order.py`). Iteration begins at the position of the state, which is that of the first
    optimizer step some of whose micro-batches have not been handed out yet. Stored images of
    another (height, width) than `image_size` are resized; poses are drawn at `pose_map_size`.
    """

    def __init__(
        self,
        table: PairTable,
        order: OrderConfig,
        config: LoaderConfig,
        *,
        micro_batch: int,
        image_size: tuple[int, int],
        pose_map_size: tuple[int, int] = POSE_MAP_SIZE,
        rank: int = 0,
        num_ranks: int = 1,
    ) -> None:
        self.accumulation = accumulation_steps(order.global_batch, micro_batch, num_ranks)
        self.steps_per_epoch = num_steps(table.sets, order)
        self.table = table
        self._order = order
        self._config = config
        self._micro_batch, self._rank, self._num_ranks = micro_batch, rank, num_ranks
        self._position = (0, 0)
        self._epoch = lru_cache(maxsize=2)(lambda epoch: epoch_order(table.sets, order, epoch))
        self._pair_shard = np.concatenate([pairs.shards for pairs in table.sets])
        self._files = ShardFiles(table.shards, config.cache)
        self.has_latents = config.use_latents and table.has_latents
        latent_shape = read_latent_shape(table, self._files) if self.has_latents else None
        self._shape = BatchShape(
            num_pairs=micro_batch,
            image_size=image_size,
            latent_shape=latent_shape,
            pose_map_size=pose_map_size,
        )
        self._filler = BatchFiller(
            table, self._files, self._shape, flip=config.flip_source, seed=order.seed
        )
        self._check_cache()
        self._report()

    def __iter__(self) -> Iterator[Batch]:
        workers, ahead = self._config.num_workers, self._config.prefetch_batches
        prepared = prepare_batches(
            self._tasks(), self._filler, self._files, self._shape, num_workers=workers, ahead=ahead
        )
        with closing(prepared):
            for task, batch in prepared:
                self._position = self._after(task)
                yield batch

    @property
    def latent_shape(self) -> tuple[int, int, int] | None:
        """Channels (means, then log-variances), height, width of stored latents; None: not used."""
        return self._shape.latent_shape

    def state_dict(self) -> dict[str, Any]:
        """Return the position, and what must be the same for a run to continue from it."""
        epoch, step = self._position
        return {
            "epoch": epoch,
            "step": step,
            "order": asdict(self._order),
            "sets": [asdict(identity) for identity in self.table.identities],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to the position of a state; the next iteration begins there, in no time.

        Ranks, workers, micro-batch and the place of the shard sets may have changed.

        Raises:
            ValueError: If it belongs to another order of pairs.
        """
        changes = [
            f"order.{name}: {state['order'].get(name)!r}, now {value!r}"
            for name, value in asdict(self._order).items()
            if state["order"].get(name) != value
        ]
        changes += differences(state["sets"], self.table.identities)
        if changes:
            raise ValueError(
                "the checkpoint's order of pairs cannot be continued: "
                + "; ".join(changes)
                + ". Undo these changes, or begin a new run from its weights"
            )
        self._position = (int(state["epoch"]), int(state["step"]))

    def pair_keys(self, draws: Int[Tensor, " pairs"]) -> list[tuple[str, str]]:
        """Return the keys of the source and the target image of each draw, for reports."""
        return self.table.pair_keys(pairs_of(draws.cpu().numpy(), self.table.sets))

    def _tasks(self) -> Iterator[Task]:
        epoch, step = self._position
        for number in itertools.count():
            position, micro = divmod(number, self.accumulation)
            ahead, step_now = divmod(step + position, self.steps_per_epoch)
            draws = self._epoch(epoch + ahead)[step_now]
            if micro == 0:
                upcoming = self._upcoming(epoch + ahead, step_now)
            yield Task(
                epoch=epoch + ahead,
                step=step_now,
                is_last=micro == self.accumulation - 1,
                draws=micro_batches(draws, self._micro_batch, self._rank, self._num_ranks)[micro],
                upcoming=upcoming,
            )

    def _after(self, task: Task) -> tuple[int, int]:
        """The position once this micro-batch has been handed out."""
        steps = task.epoch * self.steps_per_epoch + task.step + task.is_last
        return divmod(steps, self.steps_per_epoch)

    def _upcoming(self, epoch: int, step: int) -> tuple[int, ...]:
        """The remote shards of the next steps of all ranks, in the order they are needed."""
        if not self._files.has_remote:
            return ()
        end = step + self._config.cache.lookahead_steps
        draws = self._epoch(epoch)[step:end]
        if end > self.steps_per_epoch:
            draws = np.concatenate([draws, self._epoch(epoch + 1)[: end - self.steps_per_epoch]])
        shards = self._pair_shard[pairs_of(draws.reshape(-1), self.table.sets)]
        names, first = np.unique(shards, return_index=True)
        return tuple(names[np.argsort(first)].tolist())

    def _check_cache(self) -> None:
        if not self._files.has_remote:
            return
        needed = 0
        for pairs in self.table.sets:
            sizes = [self.table.shards[shard].size_bytes for shard in np.unique(pairs.shards)]
            needed += sum(sorted(sizes)[-2 * self._order.block_shards :])
        if needed > self._config.cache.size_bytes:
            raise ValueError(
                f"cache.size_bytes is {self._config.cache.size_bytes}, but two blocks of "
                f"{self._order.block_shards} shards of each set have up to {needed} bytes; raise "
                "it, or lower order.block_shards"
            )

    def _report(self) -> None:
        draws = sum(pairs.num_draws for pairs in self.table.sets)
        rest = draws - self.steps_per_epoch * self._order.global_batch
        logger.info(
            "an epoch is %d pairs in %d steps of %d",
            draws,
            self.steps_per_epoch,
            self._order.global_batch,
        )
        if rest > 0:
            logger.info(
                "the last %d pairs of each epoch are dropped (order.fill_last would fill a batch "
                "with them)",
                rest,
            )
        elif rest < 0:
            logger.info("%d pairs of each epoch come twice to fill its last batch", -rest)
        if self._config.use_latents and not self.has_latents and self.table.latent.size.any():
            logger.warning("stored latents are not used: not all images of all sets have them")


def load_pairs(
    table: PairTable,
    pairs: Sequence[int],
    cache: CacheConfig,
    *,
    image_size: tuple[int, int],
    pose_map_size: tuple[int, int] = POSE_MAP_SIZE,
) -> Batch:
    """Load pairs of a table now and here, unmirrored and with all images: to be looked at."""
    shape = BatchShape(
        num_pairs=len(pairs),
        image_size=image_size,
        latent_shape=None,
        pose_map_size=pose_map_size,
    )
    files = ShardFiles(table.shards, cache)
    filler = BatchFiller(table, files, shape, flip=0.0, seed=0)
    buffer = shape.allocate()
    try:
        filling = filler.fill(buffer, np.array(pairs, np.int64))
    finally:
        files.close()
    return take_batch(buffer, filling, epoch=0, step=0)
