"""Starts Ray quietly on this machine, or joins a cluster, for as long as the job needs it."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray

# Only paths, keypoints and index rows cross the object store; Ray's own default is 30 % of memory.
_OBJECT_STORE_BYTES = 512 * 2**20

# Read when Ray starts. No metrics agents: nobody reads them, and they take seconds to start.
_QUIET_ENVIRONMENT = {
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # Ray warns of this future default at every start
    "RAY_BACKEND_LOG_LEVEL": "fatal",  # it writes to the terminal what nobody can act on
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_IGNORE_UNHANDLED_ERRORS": "1",  # the first one ends the job; the others say the same
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_enable_metrics_collection": "0",
}


@contextmanager
def ray_session(address: str | None, num_workers: int | None) -> Iterator[int]:
    """Give the number of tasks to run at once; Ray runs inside the block.

    A Ray that runs in this process already is used, and left running. Nothing of the working
    directory is sent to the workers: the package is installed where they run.
    """
    is_ours = not ray.is_initialized()
    options: dict[str, Any]
    if is_ours:
        for name, value in _QUIET_ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        if address is None:
            options = {
                "num_cpus": num_workers,
                "object_store_memory": _OBJECT_STORE_BYTES,
                "include_dashboard": False,
            }
        else:
            options = {"address": address}
        with _silenced_standard_error():
            ray.init(**options, log_to_driver=False, logging_level=logging.ERROR)
    try:
        num_cpus = max(1, int(ray.cluster_resources().get("CPU", 1)))
        yield num_cpus if num_workers is None else min(num_workers, num_cpus)
    finally:
        if is_ours:
            ray.shutdown()


@contextmanager
def _silenced_standard_error() -> Iterator[None]:
    """Send the process's standard error nowhere: Ray's C++ part reports there which level it has.

    What goes wrong comes as an exception all the same.
    """
    sys.stderr.flush()
    saved = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(nowhere)
        os.close(saved)
