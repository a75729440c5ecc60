"""Stages of a demonstration: commands that run one after another, once."""

from __future__ import annotations

import json
import logging
import os
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from cfld.whole_file import whole_file

logger = logging.getLogger(__name__)

RECORD_FILE = "stages.json"
_MOST_SECONDS_TO_STOP = 40  # the launcher itself gives its ranks 30


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One step: a command for the shell, and the work of this program before it, if any."""

    name: str
    title: str
    command: tuple[str, ...]
    prepare: Callable[[], None] | None = None

    @property
    def shown(self) -> str:
        """The command as a user would type it."""
        program = Path(self.command[0]).name.replace("python3", "python")
        return shlex.join((program, *self.command[1:]))


@dataclass(frozen=True, kw_only=True)
class StageRecord:
    """What is known of a stage that ran, to its end or not; `seconds` of all its runs together."""

    command: str
    seconds: float
    is_done: bool


class StageError(RuntimeError):
    """A stage's command failed."""


def run_stages(stages: Sequence[Stage], folder: Path) -> dict[str, StageRecord]:
    """Run the stages that are not done yet, and record each in `folder`.

    A stage that was interrupted is started again and goes on by itself.

    Raises:
        StageError: If a command fails; the stages before it stay done. Also if the folder holds
            what other commands made.
    """
    records = read_records(folder)
    for stage in stages:
        record = records.get(stage.name)
        if record and record.command != stage.shown:
            raise StageError(
                f"{folder} was made with other options: '{record.command}', not '{stage.shown}'; "
                "delete it, or give another --output"
            )
    for number, stage in enumerate(stages, start=1):
        record = records.get(stage.name)
        head = f"[{number}/{len(stages)}] {stage.title}"
        if record and record.is_done:
            logger.info("%s: done before, in %s", head, describe_seconds(record.seconds))
            continue
        logger.info("\n%s\n  %s", head, stage.shown)
        spent = record.seconds if record else 0.0
        began = time.monotonic()
        is_done = False
        try:
            if stage.prepare:
                stage.prepare()
            _run(stage)
            is_done = True
        finally:
            seconds = spent + time.monotonic() - began
            records[stage.name] = StageRecord(command=stage.shown, seconds=seconds, is_done=is_done)
            _write_records(folder, records)
        logger.info("  took %s", describe_seconds(seconds))
    return records


def read_records(folder: Path) -> dict[str, StageRecord]:
    """Return what is known of the stages that ran in a folder."""
    try:
        text = (folder / RECORD_FILE).read_text(encoding="utf-8")
    except FileNotFoundError:
        return {}
    return {name: StageRecord(**fields) for name, fields in json.loads(text).items()}


def describe_seconds(seconds: float) -> str:
    """Return a duration as text, such as `12 min 05 s`."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{seconds:.1f} s"


def _run(stage: Stage) -> None:
    # DeepSpeed warns of having found no accelerator unless it is told that there is none.
    environment = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"} | os.environ
    try:
        process = subprocess.Popen(stage.command, env=environment, start_new_session=True)
    except OSError as error:
        raise StageError(f"{stage.title}: {stage.command[0]} cannot be run: {error}") from error
    try:
        code = process.wait()
    except KeyboardInterrupt:
        logger.info("\nstopping: what is under way is being saved")
        os.killpg(process.pid, signal.SIGINT)
        process.wait()
        _wait_for_group(process.pid)
        raise
    if code:
        raise StageError(
            f"{stage.title}: the command above ended with exit code {code}; once what it says is "
            "mended, the same command goes on from there"
        )


def _wait_for_group(group: int) -> None:
    """Wait for what a launcher left behind when it ended: ranks that write a checkpoint."""
    deadline = time.monotonic() + _MOST_SECONDS_TO_STOP
    while time.monotonic() < deadline:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)


def _write_records(folder: Path, records: dict[str, StageRecord]) -> None:
    document = {name: asdict(record) for name, record in records.items()}
    with whole_file(folder / RECORD_FILE) as unfinished:
        unfinished.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
