"""Draw a set of persons into a folder: in parallel, resumable, the same bytes every time."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import shutil
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from tqdm import tqdm

from preprocessing.figures.figure import draw_figure, pose_figure

logger = logging.getLogger(__name__)

SETTINGS, TABLE, UNFINISHED = "figures.json", "figures.parquet", ".drawing"
"""The settings are written last: a folder that has them is complete."""

FIRST_TEST_PERSON = 1_000_000
"""Test persons are the same ones however many train persons a set has, and never among them."""

COLUMNS = pa.schema(
    {
        "image": pa.string(),
        "person_id": pa.string(),
        "split": pa.string(),
        "view": pa.string(),
        "keypoints": pa.list_(pa.list_(pa.float32(), 3), 18),
    }
)


class SettingsMismatchError(Exception):
    """The folder holds, or began to hold, something else than the figures asked for."""


@dataclass(frozen=True, kw_only=True)
class FigureSettings:
    """What a drawn set holds; `size` is (height, width) in pixels."""

    num_persons: int = 400
    num_test_persons: int = 20
    images_per_person: int = 8
    size: tuple[int, int] = (64, 64)
    seed: int = 0

    def __post_init__(self) -> None:
        if self.num_persons < 0 or self.num_test_persons < 0 or not self.persons:
            raise ValueError(
                f"{self.num_persons} train and {self.num_test_persons} test persons: "
                "neither may be negative, nor both 0"
            )
        if self.num_persons > FIRST_TEST_PERSON:
            raise ValueError(f"{self.num_persons} train persons: at most {FIRST_TEST_PERSON}")
        if self.images_per_person < 1:
            raise ValueError(f"{self.images_per_person} images per person: at least 1 is needed")
        if min(self.size) < 32:
            raise ValueError(f"size {self.size}: figures need at least 32 pixels either way")
        if self.seed < 0:
            raise ValueError(f"seed {self.seed}: it cannot be negative")

    @property
    def persons(self) -> list[tuple[str, int]]:
        """Split and number of every person."""
        tests = range(FIRST_TEST_PERSON, FIRST_TEST_PERSON + self.num_test_persons)
        return [("train", i) for i in range(self.num_persons)] + [("test", i) for i in tests]


def draw_dataset(root: str, settings: FigureSettings, num_workers: int | None = None) -> None:
    """Draw a set into `root`, on all cores unless told otherwise; go on where it was interrupted.

    `root` then holds `train/<person>/<nn>.png` and `test/...`, the regions of every picture as
    grey levels under `regions/`, and a table of exact keypoints that the `table` adapter reads.
    The bytes depend on the settings alone, not on `num_workers`.

    Raises:
        SettingsMismatchError: If `root` holds other figures, or files of another kind.
    """
    folder = Path(root)
    _claim(folder, settings)
    if (folder / SETTINGS).is_file():
        logger.info("%s holds these figures already", root)
        return
    tasks = [(folder, settings, split, person) for split, person in settings.persons]
    num_workers = min(num_workers or os.cpu_count() or 1, len(tasks))
    with tqdm(total=len(tasks), desc="drawing", unit=" persons") as progress:
        if num_workers == 1:
            for task in tasks:
                _draw_person(task)
                progress.update()
        else:
            # A forked copy of a process with threads (Ray, torch) can hang. What this module
            # imports is all that a spawned one has to load: neither torch nor the adapters.
            spawn = multiprocessing.get_context("spawn")
            with ProcessPoolExecutor(num_workers, mp_context=spawn) as pool:
                for _ in pool.map(_draw_person, tasks, chunksize=4):
                    progress.update()
    pq.write_table(_table(settings), folder / UNFINISHED / TABLE)
    (folder / UNFINISHED / TABLE).replace(folder / TABLE)
    (folder / UNFINISHED / SETTINGS).replace(folder / SETTINGS)
    shutil.rmtree(folder / UNFINISHED)


def _read_settings(folder: Path) -> FigureSettings | None:
    """The settings of a complete or begun set, None where there is none."""
    for path in (folder / SETTINGS, folder / UNFINISHED / SETTINGS):
        if path.is_file():
            try:
                fields = json.loads(path.read_text(encoding="utf-8"))
                return FigureSettings(**{**fields, "size": tuple(fields["size"])})
            except (ValueError, TypeError, KeyError) as error:
                raise SettingsMismatchError(f"{path} is not of drawn figures: {error}") from error
    return None


def _claim(folder: Path, settings: FigureSettings) -> None:
    """Write down what is being drawn here, before the first picture, unless it was before."""
    found = _read_settings(folder)
    if found is not None and found != settings:
        raise SettingsMismatchError(
            f"{folder} holds figures drawn with {found}, not {settings}; "
            "choose another folder or delete this one"
        )
    if found is not None:
        return
    if folder.exists() and any(path.name != UNFINISHED for path in folder.iterdir()):
        raise SettingsMismatchError(
            f"{folder} is not empty and not a set of drawn figures; choose another folder"
        )
    (folder / UNFINISHED).mkdir(parents=True, exist_ok=True)
    partial = folder / UNFINISHED / f"{SETTINGS}.partial"
    partial.write_text(json.dumps(asdict(settings), indent=2) + "\n", encoding="utf-8")
    partial.replace(folder / UNFINISHED / SETTINGS)


def _draw_person(task: tuple[Path, FigureSettings, str, int]) -> None:
    """Draw one person's folders under a temporary name and move them into place, photos last."""
    folder, settings, split, person = task
    name = _person_id(person)
    if (folder / split / name).is_dir():
        return
    partial = folder / UNFINISHED / name
    shutil.rmtree(partial, ignore_errors=True)
    places = {"regions": folder / "regions" / split / name, "images": folder / split / name}
    for kind in places:
        (partial / kind).mkdir(parents=True)
    for i in range(settings.images_per_person):
        figure = draw_figure(person, i, size=settings.size, seed=settings.seed)
        Image.fromarray(figure.image).save(partial / "images" / _file_name(i))
        Image.fromarray(figure.regions).save(partial / "regions" / _file_name(i))
    for kind, place in places.items():
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(place, ignore_errors=True)
        (partial / kind).replace(place)
    partial.rmdir()


def _table(settings: FigureSettings) -> pa.Table:
    rows = []
    for split, person in settings.persons:
        for i in range(settings.images_per_person):
            keypoints, view = pose_figure(person, i, size=settings.size, seed=settings.seed)
            name = _person_id(person)
            image = f"{split}/{name}/{_file_name(i)}"
            values = (image, name, split, view, keypoints.tolist())
            rows.append(dict(zip(COLUMNS.names, values, strict=True)))
    return pa.Table.from_pylist(rows, schema=COLUMNS)


def _person_id(person: int) -> str:
    return f"{person:07d}"


def _file_name(image: int) -> str:
    return f"{image:02d}.png"
