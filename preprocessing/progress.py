"""Shows images per second and the time left, and keeps the seconds of each stage."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from tqdm import tqdm

_REDRAW_S = 0.5
_REDRAW_IN_LOG_S = 30.0  # a log file gets a line each time


@dataclass
class Progress:
    """Clock and progress bars of a job's stages."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str, total: int = 0, done: int = 0) -> Iterator[tqdm]:
        """Time a stage; with a total its bar is shown, on standard error."""
        start = time.monotonic()
        interval = _REDRAW_S if sys.stderr.isatty() else _REDRAW_IN_LOG_S
        with tqdm(
            desc=name,
            total=total,
            initial=done,
            unit="image",
            mininterval=interval,
            disable=not total,
            dynamic_ncols=True,
        ) as bar:
            yield bar
        self.seconds[name] = time.monotonic() - start
