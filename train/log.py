"""What a run tells: progress bar, metrics.jsonl, skipped.jsonl, TensorBoard, and W&B if asked."""

from __future__ import annotations

import json
import logging
import math
import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import UInt8
from numpy import ndarray
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from train.checkpoint import write_whole

logger = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"
SKIPPED_FILE = "skipped.jsonl"
_LINE_EVERY_S = 30.0
_GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """Where else figures go; `metrics.jsonl` always gets those of every step."""

    tensorboard: bool = True
    wandb: str | None = None
    """Project in Weights & Biases (pip install wandb); nothing is sent without it."""
    every_steps: int = 10
    """Steps between the figures that these two get."""

    def __post_init__(self) -> None:
        if self.every_steps < 1:
            raise ValueError(f"log.every_steps is {self.every_steps}, must be positive")


@dataclass(frozen=True, kw_only=True)
class StepMetrics:
    """The figures of one optimizer step; `step` counts from 1."""

    step: int
    epoch: int
    loss: float
    learning_rate: float
    gradient_norm: float
    loss_scale: float
    images_per_s: float
    """Denoised images of all ranks: two for each pair."""
    data_wait: float
    """Share of the step that the first rank waited for data."""
    memory_gib: float
    """Most memory that the first rank has used, on its GPU if it has one."""
    skipped: int
    """Steps skipped so far."""


class RunLog:
    """The logs of a run, written by its first rank."""

    def __init__(self, run: Path, config: LogConfig, *, step: int, num_steps: int) -> None:
        """Continue the logs after a step; what they hold of later ones is cut off."""
        self._config = config
        self._num_steps = num_steps
        for name in (METRICS_FILE, SKIPPED_FILE):
            cut_lines(run / name, step)
        self._metrics = (run / METRICS_FILE).open("a", encoding="utf-8")
        self._skipped = run / SKIPPED_FILE
        self._board = None
        if config.tensorboard:
            self._board = SummaryWriter(str(run / "tensorboard"), purge_step=step + 1)
        self._wandb = _start_wandb(run, config)
        self._bar = tqdm(
            total=num_steps, initial=step, unit="step", dynamic_ncols=True, disable=None
        )
        self._line_due = time.monotonic()

    def write(self, metrics: StepMetrics) -> None:
        """Take in the figures of a step."""
        figures = asdict(metrics)
        # JSON has no word for what is not finite.
        known = {name: figures[name] if math.isfinite(figures[name]) else None for name in figures}
        self._metrics.write(json.dumps(known) + "\n")
        self._metrics.flush()
        if metrics.step % self._config.every_steps == 0:
            shown = {name: figures[name] for name in figures if name != "step"}
            if self._board:
                for name, value in shown.items():
                    self._board.add_scalar(name, value, metrics.step)
            if self._wandb:
                self._wandb.log(shown, step=metrics.step)
        text = (
            f"loss {metrics.loss:.4f}, {metrics.images_per_s:.1f} images/s, data wait "
            f"{metrics.data_wait:.0%}, loss scale {metrics.loss_scale:g}, "
            f"{metrics.memory_gib:.1f} GiB"
        )
        self._bar.set_postfix_str(text, refresh=False)
        self._bar.update()
        if self._bar.disable and (
            time.monotonic() >= self._line_due or metrics.step == self._num_steps
        ):
            self._line_due = time.monotonic() + _LINE_EVERY_S
            logger.info("step %d of %d: %s", metrics.step, self._num_steps, text)

    def write_skipped(self, step: int, reason: str, pairs: Sequence[tuple[str, str]]) -> None:
        """Note a step that changed nothing, and all pairs to blame."""
        line = {"step": step, "reason": reason, "pairs": [list(pair) for pair in pairs]}
        with self._skipped.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def write_picture(self, step: int, picture: UInt8[ndarray, "height width 3"]) -> None:
        """Show a picture beside the figures."""
        if self._board:
            self._board.add_image("pictures", picture, step, dataformats="HWC")
        if self._wandb:
            import wandb

            self._wandb.log({"pictures": wandb.Image(picture)}, step=step)

    def close(self) -> None:
        """Close all files."""
        self._bar.close()
        self._metrics.close()
        if self._board:
            self._board.close()
        if self._wandb:
            self._wandb.finish()


def cut_lines(path: Path, step: int) -> None:
    """Drop the lines of a JSON lines file that belong to later steps, or are torn."""
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    kept = [line for line in lines if _step_of(line) <= step]
    if len(kept) < len(lines):
        write_whole(path, "".join(kept))


def peak_memory_gib(device: torch.device) -> float:
    """Return the most memory this process has used on its device so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device) / _GIB
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / _GIB


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf


def _start_wandb(run: Path, config: LogConfig) -> Any:
    if config.wandb is None:
        return None
    import wandb  # optional

    name = run.name
    return wandb.init(project=config.wandb, name=name, id=name, dir=str(run), resume="allow")
