"""Checkpoints: what a run needs to go on, in files that fit any number of ranks and ZeRO stage.

RUN/checkpoints/step-00001000/part-00000-of-00004.safetensors   KIND/PARAMETER, one per rank
state.json                        position, scaler, identity
RUN/checkpoints/latest                                          the name of the newest
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from train.masters import MOMENTS, WEIGHTS, Masters
from train.processes import Ranks

logger = logging.getLogger(__name__)

VERSION = 1
STATE_FILE = "state.json"
LATEST_FILE = "latest"
EMA = "ema"
KINDS = (WEIGHTS, *MOMENTS)
_FOLDER = "checkpoints"
_TORN = ".torn-"


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When checkpoints are written, and how many stay."""

    every_steps: int = 1000
    """One is also written at the end, and when the run is told to stop."""
    keep: int = 2
    """The newest so many stay."""

    def __post_init__(self) -> None:
        if min(self.every_steps, self.keep) < 1:
            raise ValueError(
                f"checkpoint.every_steps is {self.every_steps}, keep is {self.keep}: both must be "
                "positive"
            )


class CheckpointError(ValueError):
    """A checkpoint that is damaged, or belongs to another run."""


@dataclass(frozen=True, kw_only=True)
class CheckpointState:
    """All of a checkpoint that is not a tensor."""

    step: int
    """Optimizer steps done, skipped ones included."""
    num_updates: int
    """Steps in which the weights changed."""
    loader: dict[str, Any]
    scaler: dict[str, float]
    frozen_sha256: str
    has_ema: bool
    num_files: int
    version: int = VERSION


class Checkpoint:
    """An open checkpoint, whose tensors are read one at a time."""

    def __init__(self, folder: Path) -> None:
        """Open a checkpoint's files.

        Raises:
            CheckpointError: If a file is missing or damaged, or of another version.
        """
        self.folder = folder
        self.state = _read_state(folder)
        self._files: dict[str, Any] = {}
        for number in range(self.state.num_files):
            path = folder / _part_name(number, self.state.num_files)
            try:
                file = safe_open(path, framework="pt")
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"{path}: cannot be read: {error}") from error
            self._files |= dict.fromkeys(file.keys(), file)

    def read(self, kind: str, name: str) -> Tensor:
        """Read one parameter's tensor.

        Raises:
            CheckpointError: If there is none.
        """
        key = f"{kind}/{name}"
        if key not in self._files:
            raise CheckpointError(f"{self.folder}: holds no {key}; was the model changed?")
        return self._files[key].get_tensor(key)

    def names(self, kind: str) -> set[str]:
        """Return the parameters that there are tensors of a kind for."""
        return {key.partition("/")[2] for key in self._files if key.startswith(f"{kind}/")}


def find_latest(run: Path) -> Path | None:
    """Return the newest whole checkpoint of a run."""
    try:
        name = (run / _FOLDER / LATEST_FILE).read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        return None
    return run / _FOLDER / name


def clean_up(run: Path) -> None:
    """Remove what a killed run left half written."""
    for folder in (run / _FOLDER).glob(f"{_TORN}*"):
        logger.info("removing %s, which a run that was killed left", folder)
        shutil.rmtree(folder, ignore_errors=True)


def share_out(sizes: Mapping[str, int], num_ranks: int) -> list[set[str]]:
    """Assign parameters to ranks so that each has about as many numbers, the largest first."""
    shares: list[set[str]] = [set() for _ in range(num_ranks)]
    loads = [0] * num_ranks
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        rank = loads.index(min(loads))
        shares[rank].add(name)
        loads[rank] += sizes[name]
    return shares


def save_checkpoint(
    run: Path,
    state: CheckpointState,
    masters: Masters,
    ranks: Ranks,
    owned: set[str],
    *,
    ema: Mapping[str, Tensor],
    keep: int,
) -> Path:
    """Write a checkpoint; collective. Each rank writes the parameters that it owns.

    All files lie in a folder with a temporary name until the last is whole.
    """
    name = f"step-{state.step:08d}"
    folder, torn = run / _FOLDER / name, run / _FOLDER / f"{_TORN}{name}"
    torn.mkdir(parents=True, exist_ok=True)
    tensors = {f"{EMA}/{name}": weight.cpu() for name, weight in ema.items()}
    for kind in KINDS:
        for parameter in masters.parameters:
            tensor = masters.read(parameter, kind)
            if parameter in owned:
                tensors[f"{kind}/{parameter}"] = tensor.cpu().contiguous()
    path = torn / _part_name(ranks.rank, ranks.num_ranks)
    save_file(tensors, path)
    _sync(path)
    ranks.wait()
    if ranks.is_first:
        state_file = torn / STATE_FILE
        state_file.write_text(json.dumps(asdict(state), indent=1), encoding="utf-8")
        _sync(state_file)
        shutil.rmtree(folder, ignore_errors=True)  # a run that went back may come here again
        torn.rename(folder)
        _sync(folder.parent)
        write_whole(run / _FOLDER / LATEST_FILE, name)
        _drop_old(run, keep, folder)
    ranks.wait()
    return folder


def write_whole(path: Path, text: str) -> None:
    """Write a small file so that it is there whole or not at all."""
    partial = path.with_name(f".{path.name}.tmp")
    partial.write_text(text, encoding="utf-8")
    _sync(partial)
    partial.replace(path)
    _sync(path.parent)


def _drop_old(run: Path, keep: int, newest: Path) -> None:
    folders = sorted((run / _FOLDER).glob("step-*"))
    # Steps after the newest belong to a future that the run went back from.
    stale = [folder for folder in folders if folder.name > newest.name]
    before = [folder for folder in folders if folder.name <= newest.name]
    for folder in stale + before[:-keep]:
        shutil.rmtree(folder, ignore_errors=True)


def _read_state(folder: Path) -> CheckpointState:
    path = folder / STATE_FILE
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error
    if state.get("version") != VERSION:
        raise CheckpointError(
            f"{path}: version {state.get('version')}, this trainer reads {VERSION}; go on with "
            "the version of cfld that wrote it"
        )
    return CheckpointState(**state)


def _part_name(number: int, total: int) -> str:
    return f"part-{number:05d}-of-{total:05d}.safetensors"


def _sync(path: Path) -> None:
    """Have the file or folder on the disk, so that a rename cannot overtake it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
