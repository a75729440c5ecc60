"""A job of images on one device in this process, or spread over several processes."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from threading import Thread
from typing import Any

import torch

from cfld.evaluation.pair_images import GenerationError, ImageJob, make_images
from cfld.evaluation.photo_source import SourceError
from cfld.saved_pipeline import WeightsError

logger = logging.getLogger(__name__)

REPORT_EVERY_S = 30.0


def choose_devices(device: str, num_workers: int | None) -> list[str]:
    """Return the device of each worker: by default one for each GPU, or one with all CPU cores."""
    if device != "cuda":
        return [device] * (num_workers or 1)
    num_gpus = torch.cuda.device_count()
    return [f"cuda:{worker % num_gpus}" for worker in range(num_workers or num_gpus)]


def run_job(job: ImageJob, devices: Sequence[str]) -> None:
    """Make what of a job is not there yet, with a process for each device if there are several.

    Raises:
        WeightsError, SourceError, GenerationError: As `make_images`; or if a worker is killed.
    """
    remaining = job.remaining()
    logger.info("%d images to make, %d are there", len(remaining), len(job) - len(remaining))
    if not len(remaining):
        return
    progress = _Progress(len(remaining))
    if len(devices) == 1:
        make_images(remaining, devices[0], progress.add)
    else:
        _run_workers(remaining, devices, progress)


def _run_workers(job: ImageJob, devices: Sequence[str], progress: _Progress) -> None:
    context = multiprocessing.get_context("spawn")
    num_threads = max(1, torch.get_num_threads() // len(devices))
    workers: dict[Any, BaseProcess] = {}
    try:
        for rank, device in enumerate(devices):
            receiver, sender = context.Pipe(duplex=False)
            share = _share(job, rank, len(devices))
            workers[receiver] = context.Process(
                target=_work, args=(share, device, num_threads, sender), daemon=True
            )
            workers[receiver].start()
            sender.close()  # the worker has its own, which is closed when it ends, however it ends
        _receive(workers, progress)
    finally:
        for worker in workers.values():
            worker.terminate()
            worker.join()


def _share(job: ImageJob, rank: int, num_workers: int) -> ImageJob:
    """The part of one worker: a stretch of the pairs, so that most of a source's stay together."""
    first, last = (len(job.pairs) * each // num_workers for each in (rank, rank + 1))
    return replace(
        job, pairs=job.pairs[first:last], reconstructed=job.reconstructed[rank::num_workers]
    )


def _receive(workers: Mapping[Any, BaseProcess], progress: _Progress) -> None:
    """Take counts of images until all workers have ended; raise what ended one of them."""
    running = dict(workers)
    while running:
        for receiver in wait(list(running)):
            try:
                message: Any = receiver.recv()  # type: ignore[union-attr, call-arg]  # ours are pipes
            except EOFError:
                worker = running.pop(receiver)
                worker.join()
                if worker.exitcode:
                    raise GenerationError(
                        f"a worker ended with exit code {worker.exitcode} (-9: killed, as for want "
                        "of memory); run the same command to go on, perhaps with fewer --workers"
                    ) from None
                continue
            if isinstance(message, Exception):
                raise message
            progress.add(message)


def _work(job: ImageJob, device: str, num_threads: int, sender: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its workers
    Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(num_threads)
    try:
        make_images(job, device, sender.send)
    except (WeightsError, SourceError, GenerationError) as error:
        sender.send(error)
    except Exception as error:
        sender.send(GenerationError(f"{type(error).__name__}: {error}"))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


class _Progress:
    """Logs how far a job is, now and then."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.done = 0
        self.start = self.reported = time.monotonic()

    def add(self, count: int) -> None:
        """Take note of images that came to be."""
        self.done += count
        now = time.monotonic()
        if now - self.reported < REPORT_EVERY_S and self.done < self.total:
            return
        self.reported = now
        rate = self.done / (now - self.start)
        left = timedelta(seconds=round((self.total - self.done) / rate))
        logger.info("%d of %d images, %.2g images/s, %s left", self.done, self.total, rate, left)
