"""Starts Ray quietly on this machine, or joins a cluster, for as long as the job needs it."""

from __future__ import annotations

import logging
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray

from preprocessing.job_settings import SettingsError

_NEW, _ANY = "local", "auto"  # addresses in Ray's words: one of its own; whatever runs here
_PATIENCE_S = 5.0  # with an address that does not answer; Ray's own lasts many minutes

logger = logging.getLogger(__name__)

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

    A Ray that runs in this process already is used, and left running. Without an address that of
    the environment's `RAY_ADDRESS` counts, as everywhere in Ray, and without either a Ray of its
    own is started. Nothing of the working directory is sent to the workers: the package is
    installed where they run.

    Raises:
        SettingsError: If no cluster answers at the address, or Ray cannot be started.
    """
    is_ours = not ray.is_initialized()
    if is_ours:
        _start(address or os.environ.get("RAY_ADDRESS") or _NEW, num_workers)
    try:
        num_cpus = max(1, int(ray.cluster_resources().get("CPU", 1)))
        yield num_cpus if num_workers is None else min(num_workers, num_cpus)
    finally:
        if is_ours:
            ray.shutdown()


def _start(address: str, num_workers: int | None) -> None:
    for name, value in _QUIET_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    options: dict[str, Any] = {"address": address}
    if address == _NEW:
        options["num_cpus"] = num_workers
        options["object_store_memory"] = _OBJECT_STORE_BYTES
        options["include_dashboard"] = False
    try:
        if address not in (_NEW, _ANY):
            host, _, port = address.rpartition("://")[2].rpartition(":")
            socket.create_connection((host.strip("[]"), int(port)), _PATIENCE_S).close()
        if address != _NEW:
            logger.info("joining the Ray cluster at %s", address)
        with _silenced_standard_error():
            ray.init(**options, log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, RuntimeError, ValueError) as error:
        what = (
            "Ray cannot start here" if address == _NEW else f"no Ray cluster answers at {address}"
        )
        raise SettingsError(
            f"{what} ({error}); check --ray-address and RAY_ADDRESS, or leave both out"
        ) from error


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
