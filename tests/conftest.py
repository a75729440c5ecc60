"""Fixtures that several test folders share."""

import os
import shutil
import signal
from pathlib import Path

import pytest
import torch

REPOSITORY = Path(__file__).resolve().parents[1]

# What a shell starts in the background ignores Ctrl-C, and so would all processes of these tests.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip tests marked `gpu` where there is none."""
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder of real photos and networks that never enter the repository; skips without it."""
    folder = Path(os.environ.get("CFLD_SHARED", REPOSITORY.parent / "shared"))
    if not folder.is_dir():
        pytest.skip(f"no real photos and networks at {folder} (set CFLD_SHARED to their folder)")
    return folder


@pytest.fixture(scope="session")
def chromium() -> str:
    """The path of an installed Chromium; skips without one."""
    found = [shutil.which(name) for name in ("chromium", "chromium-browser", "google-chrome")]
    path = next(filter(None, found), None)
    if path is None:
        pytest.skip("no Chromium is installed")
    return path
