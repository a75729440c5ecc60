"""What the tests of the job share: one Ray session, and one small set of drawn persons."""

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

from preprocessing.build_shards import main
from preprocessing.figures.drawn_set import FigureSettings, draw_dataset
from preprocessing.ray_session import ray_session
from shards.format import ShardSet, open_shards

Build = Callable[..., ShardSet]


@pytest.fixture
def nobodys() -> Iterator[Path]:
    """A folder that everybody may write to, where pytest's own are closed to others."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o777)
        yield Path(folder)


@pytest.fixture
def as_nobody() -> Callable[[], AbstractContextManager[None]]:
    """Take away root's right to read everything, if we have it."""

    @contextmanager
    def as_nobody() -> Iterator[None]:
        is_root = os.geteuid() == 0
        if is_root:
            os.seteuid(65534)
        try:
            yield
        finally:
            if is_root:
                os.seteuid(0)

    return as_nobody


@pytest.fixture(scope="session")
def ray_workers() -> Iterator[int]:
    """A Ray of two workers, which every job in this process uses: starting one takes seconds."""
    with ray_session(None, 2) as num_workers:
        yield num_workers


@pytest.fixture(scope="session")
def drawn_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six train and two test persons with three photos each, PNG, with keypoints."""
    root = tmp_path_factory.mktemp("drawn") / "figures"
    settings = FigureSettings(
        num_persons=6, num_test_persons=2, images_per_person=3, size=(64, 48), seed=1
    )
    draw_dataset(str(root), settings, num_workers=1)
    return root


@pytest.fixture(scope="session")
def build(ray_workers: int) -> Build:
    """Run the command in this process and open what it left."""

    def build(dataset: str, root: Path | str, output: Path, *options: str | Path) -> ShardSet:
        words = ["--dataset", dataset, "--root", root, "--output", output, *options]
        assert main([str(word) for word in words]) == 0
        return open_shards(str(output))

    return build


@pytest.fixture(scope="session")
def drawn_shards(
    drawn_root: Path, build: Build, tmp_path_factory: pytest.TempPathFactory
) -> ShardSet:
    """The drawn set in several small shards: train at 48x40, test as it is."""
    output = tmp_path_factory.mktemp("shards") / "drawn"
    return build("synthetic", drawn_root, output, "--shard-size", "0.05")
