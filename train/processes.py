"""The processes of a run: one per accelerator, started by the `deepspeed` launcher or alone."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

# A collective may wait for rank 0 to draw pictures or write a checkpoint. That a rank is dead is
# found out by its heartbeat (`train/health.py`), much earlier than this.
_TIMEOUT = timedelta(minutes=60)


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """This process among all of a run."""

    rank: int
    num_ranks: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        """Whether this is the process that logs and writes."""
        return self.rank == 0

    def gather(self, value: Any) -> list[Any]:
        """Return the values of all ranks, in their order, on every rank."""
        values: list[Any] = [None] * self.num_ranks
        dist.all_gather_object(values, value)
        return values

    def broadcast(self, value: Any) -> Any:
        """Return the first rank's value on every rank."""
        values = [value]
        dist.broadcast_object_list(values, device=self.device)
        return values[0]

    def wait(self) -> None:
        """Wait until every rank is here."""
        dist.barrier()


def num_processes() -> int:
    """Count the processes of the run, as the launcher says; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first_process() -> bool:
    """Whether this process has rank 0, as the launcher says."""
    return os.environ.get("RANK", "0") == "0"


def has_lost_peer(error: RuntimeError) -> bool:
    """Whether a collective failed because another process ended."""
    return num_processes() > 1 and any(
        sign in str(error) for sign in ("Connection closed by peer", "Connection reset by peer")
    )


def start_processes() -> Ranks:
    """Connect to the other processes of the run."""
    rank, num_ranks = int(os.environ.get("RANK", "0")), num_processes()
    has_cuda = torch.cuda.is_available()
    device = torch.device("cpu")
    if has_cuda:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if has_cuda else "gloo",
        rank=rank,
        world_size=num_ranks,
        timeout=_TIMEOUT,
        # One process alone needs no port, which another run might have.
        store=dist.HashStore() if num_ranks == 1 else None,
    )
    return Ranks(rank=rank, num_ranks=num_ranks, device=device)


def stop_processes() -> None:
    """Disconnect from the other processes."""
    dist.destroy_process_group()
