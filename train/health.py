"""What keeps a run honest: skipped steps are reported and counted, dead ranks end all others."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Sequence
from concurrent import futures
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from types import FrameType

import torch.distributed as dist

from train.processes import Ranks

logger = logging.getLogger(__name__)

_NUM_NAMED = 8
_BEAT_S = 5.0
_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_DONE = "done"


@dataclass(frozen=True, kw_only=True)
class HealthConfig:
    """When a run gives up."""

    max_skipped: int = 10
    """Steps skipped one after the other, for loss or gradients that are not finite, to stop at."""
    silence_s: float = 40.0
    """How long a rank may be silent before the others take it for dead and end."""

    def __post_init__(self) -> None:
        if self.max_skipped < 1:
            raise ValueError(f"health.max_skipped is {self.max_skipped}, must be positive")
        if self.silence_s < 2 * _BEAT_S:
            raise ValueError(
                f"health.silence_s is {self.silence_s}, must be at least {2 * _BEAT_S:g}"
            )


class TooManySkippedError(RuntimeError):
    """Training that no longer makes progress."""


class SkipCounter:
    """Counts steps that changed nothing."""

    def __init__(self, config: HealthConfig) -> None:
        self._limit = config.max_skipped
        self._in_a_row = 0
        self.total = 0

    def count(self, step: int, was_applied: bool) -> None:
        """Take note of a step.

        Raises:
            TooManySkippedError: If it was one skipped step too many in a row.
        """
        if was_applied:
            self._in_a_row = 0
            return
        self._in_a_row += 1
        self.total += 1
        if self._in_a_row >= self._limit:
            raise TooManySkippedError(
                f"step {step}: {self._in_a_row} steps in a row had a loss or gradients that are "
                "not finite, so nothing is learnt any more. Lower optimizer.rate_per_pair, "
                "lengthen schedule.warmup_steps, or use engine.precision=bf16 instead of fp16; "
                "then run the same command: it goes on from the last checkpoint. skipped.jsonl "
                "names the pairs"
            )


def describe_pairs(pairs: Sequence[tuple[str, str]]) -> str:
    """Name the first few pairs, source > target."""
    named = ", ".join(f"{source} > {target}" for source, target in pairs[:_NUM_NAMED])
    rest = len(pairs) - _NUM_NAMED
    return f"{named} and {rest} more" if rest > 0 else named


class StopSignal:
    """Whether the run was told to stop: SIGTERM, or Ctrl-C. It then ends after the step under way.

    A second Ctrl-C ends it at once; what was learned since the last checkpoint is lost then.
    """

    def __init__(self) -> None:
        self.is_set = False
        self._before = {each: signal.signal(each, self._set) for each in _STOP_SIGNALS}

    def _set(self, number: int, frame: FrameType | None) -> None:
        del frame
        self.is_set = True
        if number == signal.SIGINT:
            signal.signal(number, self._before[signal.SIGINT])

    def close(self) -> None:
        """Give the signals their former meaning back."""
        for each, before in self._before.items():
            signal.signal(each, before)


class Heartbeat:
    """Ends this process when another rank has been silent for too long.

    A dead process on this machine is noticed by the launcher; this also notices one elsewhere, and
    one that hangs, where a collective would wait for an hour. A daemon thread tells the others
    that this rank lives, through a small server in rank 0, and listens to them.
    """

    def __init__(self, config: HealthConfig, ranks: Ranks) -> None:
        self._ranks = ranks
        self._silence_s = config.silence_s
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        if ranks.num_ranks == 1:
            return
        address = os.environ.get("MASTER_ADDR", "127.0.0.1")
        timeout = timedelta(seconds=config.silence_s)
        server = None
        if ranks.is_first:
            server = dist.TCPStore(
                address, 0, is_master=True, wait_for_workers=False, timeout=timeout
            )
        port = ranks.broadcast(server.port if server else None)
        self._server = server
        self._store = server or dist.TCPStore(address, port, is_master=False, timeout=timeout)
        self._store.set(str(ranks.rank), "0")
        ranks.wait()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Tell the others that this rank is done, and stop listening."""
        if self._thread is None:
            return
        self._stop.set()
        self._thread.join()
        self._thread = None

    def _run(self) -> None:
        others = [str(rank) for rank in range(self._ranks.num_ranks) if rank != self._ranks.rank]
        heard = dict.fromkeys(others, ("", time.monotonic()))
        number = 0
        # In a thread of their own, because the store waits for ever for a server that hangs.
        exchanges = futures.ThreadPoolExecutor(1, "heartbeat-exchange")
        while not self._stop.wait(_BEAT_S):
            number += 1
            exchange = exchanges.submit(self._exchange, number, others)
            try:
                beats = exchange.result(self._silence_s)
            except (futures.TimeoutError, RuntimeError) as error:  # a server that ended raises
                is_hanging = isinstance(error, futures.TimeoutError)
                self._end("0", self._silence_s if is_hanging else 0.0)
                continue
            now = time.monotonic()
            for rank, beat in zip(others, beats, strict=True):
                if beat != heard[rank][0]:
                    heard[rank] = (beat, now)
                elif beat != _DONE and now - heard[rank][1] > self._silence_s:
                    self._end(rank, now - heard[rank][1])
        exchanges.shutdown()
        with suppress(RuntimeError):  # rank 0 was done first
            self._store.set(str(self._ranks.rank), _DONE)

    def _exchange(self, number: int, others: list[str]) -> list[str]:
        """Tell that this rank lives; return what was last heard of the others."""
        self._store.set(str(self._ranks.rank), str(number))
        return [beat.decode() for beat in self._store.multi_get(others)]

    def _end(self, rank: str, silent_s: float) -> None:
        if self._stop.is_set():
            return
        logger.critical(
            "rank %s is gone (silent for %.0f s), so rank %d ends too; run the same command to go "
            "on from the last checkpoint",
            rank,
            silent_s,
            self._ranks.rank,
        )
        # The main thread hangs in a collective, from which no exception can call it back.
        os._exit(1)
