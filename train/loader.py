"""The streaming loader: batches in the one order of a run, prepared ahead, resumed at any step."""

from __future__ import annotations

import atexit
import itertools
import logging
import mmap
import os
import signal
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import lru_cache, partial
from types import FrameType
from typing import Any

import numpy as np
import torch
from jaxtyping import Int, Int64
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from cfld.pose import POSE_MAP_SIZE
from train.batch import (
    Batch,
    BatchFiller,
    BatchShape,
    Buffer,
    Filling,
    read_latent_shape,
    take_batch,
)
from train.order import (
    OrderConfig,
    accumulation_steps,
    epoch_order,
    micro_batches,
    num_steps,
    pairs_of,
)
from train.pairs import PairTable, differences
from train.shard_cache import CacheConfig, ShardError, ShardFiles

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


@dataclass(frozen=True, kw_only=True)
class _Task:
    """One micro-batch to fill, and into which buffer; `upcoming` are the shards needed next."""

    buffer: int
    epoch: int
    step: int
    is_last: bool
    draws: Int64[np.ndarray, " pairs"]
    upcoming: tuple[int, ...]


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
        num_workers, ahead = self._config.num_workers, self._config.prefetch_batches
        # The DataLoader has at most this many batches under way, so a buffer that comes round
        # again has been copied out.
        buffers = [self._shape.allocate() for _ in range(num_workers * ahead + 1)]
        with _ending_flag() as is_over, ThreadPoolExecutor(1, "take-batch") as thread:
            fillings = iter(
                DataLoader(
                    _Fillings(self._filler, self._files, buffers),
                    batch_size=None,
                    sampler=self._tasks(len(buffers)),
                    collate_fn=_as_it_is,
                    num_workers=num_workers,
                    prefetch_factor=ahead if num_workers else None,
                    multiprocessing_context="fork" if num_workers else None,
                    generator=torch.Generator(),  # else it would draw from the trainer's
                    worker_init_fn=partial(_outlive_stop_signals, is_over),
                )
            )
            # One batch is taken ahead, so that the trainer does not wait for the copy.
            following = thread.submit(_take_next, fillings, buffers)
            while True:
                task, batch = following.result()
                if isinstance(batch, ShardError):
                    del fillings  # now: the error's traceback would keep the workers
                    raise batch
                following = thread.submit(_take_next, fillings, buffers)
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

    def _tasks(self, num_buffers: int) -> Iterator[_Task]:
        epoch, step = self._position
        for number in itertools.count():
            position, micro = divmod(number, self.accumulation)
            ahead, step_now = divmod(step + position, self.steps_per_epoch)
            draws = self._epoch(epoch + ahead)[step_now]
            if micro == 0:
                upcoming = self._upcoming(epoch + ahead, step_now)
            yield _Task(
                buffer=number % num_buffers,
                epoch=epoch + ahead,
                step=step_now,
                is_last=micro == self.accumulation - 1,
                draws=micro_batches(draws, self._micro_batch, self._rank, self._num_ranks)[micro],
                upcoming=upcoming,
            )

    def _after(self, task: _Task) -> tuple[int, int]:
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


class _Fillings(Dataset[tuple[_Task, "Filling | ShardError"]]):
    """Fills the buffer that a task names; in a worker, a copy of it forked from the trainer."""

    def __init__(self, filler: BatchFiller, files: ShardFiles, buffers: list[Buffer]) -> None:
        self._filler = filler
        self._files = files
        self._buffers = buffers

    def __getitem__(self, task: _Task) -> tuple[_Task, Filling | ShardError]:
        self._files.plan(task.upcoming)
        try:
            return task, self._filler.fill(self._buffers[task.buffer], task.draws)
        except ShardError as error:  # as a value: an exception would arrive with its traceback
            return task, error


def _take_next(
    fillings: Iterator[tuple[_Task, Filling | ShardError]], buffers: list[Buffer]
) -> tuple[_Task, Batch | ShardError]:
    task, filling = next(fillings)
    if isinstance(filling, ShardError):
        return task, filling
    pin = torch.cuda.is_available()
    buffer = buffers[task.buffer]
    return task, take_batch(buffer, filling, epoch=task.epoch, step=task.step, pin=pin)


@contextmanager
def _ending_flag() -> Iterator[mmap.mmap]:
    """A byte shared with workers: 1 when this ends, or the process does."""
    flag = mmap.mmap(-1, 1)
    end = partial(flag.__setitem__, 0, 1)
    atexit.register(end)  # runs before multiprocessing ends its processes, registered earlier
    try:
        yield flag
    finally:
        end()
        atexit.unregister(end)


def _outlive_stop_signals(is_over: mmap.mmap, worker: int) -> None:
    """Let the trainer, which gets the same signals, finish its step; end when it wants no more."""
    del worker

    def end_if_over(signal_number: int, frame: FrameType | None) -> None:
        del signal_number, frame
        if is_over[0]:
            os._exit(0)

    signal.signal(signal.SIGTERM, end_if_over)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends Ctrl-C to all processes


def _as_it_is(filled: Any) -> Any:
    return filled
