"""Fills batches in worker processes, ahead of need, in buffers that they share with the trainer."""

from __future__ import annotations

import atexit
import itertools
import mmap
import os
import signal
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import FrameType
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64
from torch.utils.data import DataLoader, Dataset

from train.batch import Batch, BatchFiller, BatchShape, Buffer, Filling, take_batch
from train.shard_cache import ShardError
from train.shard_files import ShardFiles


@dataclass(frozen=True, kw_only=True)
class Task:
    """One micro-batch to fill; `upcoming` are the shards needed next."""

    epoch: int
    step: int
    is_last: bool
    draws: Int64[np.ndarray, " pairs"]
    upcoming: tuple[int, ...]


def prepare_batches(
    tasks: Iterable[Task],
    filler: BatchFiller,
    files: ShardFiles,
    shape: BatchShape,
    *,
    num_workers: int,
    ahead: int,
) -> Generator[tuple[Task, Batch], None, None]:
    """Yield the batches of endless tasks, in their order; each worker prepares `ahead` of them.

    Raises:
        ShardError: As the filler does.
    """
    # The DataLoader has at most this many batches under way, so a buffer that comes round again
    # has been copied out.
    buffers = [shape.allocate() for _ in range(num_workers * ahead + 1)]
    with _ending_flag() as is_over, ThreadPoolExecutor(1, "take-batch") as thread:
        fillings = iter(
            DataLoader(
                _Fillings(filler, files, buffers),
                batch_size=None,
                sampler=zip(itertools.cycle(range(len(buffers))), tasks, strict=False),
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
            yield task, batch


class _Fillings(Dataset[tuple[int, Task, "Filling | ShardError"]]):
    """Fills the buffer of a number; in a worker, a copy of it forked from the trainer."""

    def __init__(self, filler: BatchFiller, files: ShardFiles, buffers: list[Buffer]) -> None:
        self._filler = filler
        self._files = files
        self._buffers = buffers

    def __getitem__(self, numbered: tuple[int, Task]) -> tuple[int, Task, Filling | ShardError]:
        number, task = numbered
        self._files.plan(task.upcoming)
        try:
            return number, task, self._filler.fill(self._buffers[number], task.draws)
        except ShardError as error:  # as a value: an exception would arrive with its traceback
            return number, task, error


def _take_next(
    fillings: Iterator[tuple[int, Task, Filling | ShardError]], buffers: list[Buffer]
) -> tuple[Task, Batch | ShardError]:
    number, task, filling = next(fillings)
    if isinstance(filling, ShardError):
        return task, filling
    pin = torch.cuda.is_available()
    return task, take_batch(buffers[number], filling, epoch=task.epoch, step=task.step, pin=pin)


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
