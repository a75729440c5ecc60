"""Photo, pose and output of many images to generate, from a table; run in batches, resumable."""

from __future__ import annotations

import csv
import logging
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from cfld.pipeline import CFLDPipeline
from cfld.pipeline_inputs import Estimator, FramedPose
from cfld.sampling import Sampling
from cfld.user_inputs import InputError, check_output, read_fitted_pose, read_photo, save_image

logger = logging.getLogger(__name__)

COLUMNS = ("image", "pose", "output")


@dataclass(frozen=True)
class Job:
    """One image to generate; `row` counts from 0 and shifts the seed."""

    image: str
    pose: str
    output: str
    row: int = 0


@dataclass(frozen=True)
class Inputs:
    """A job with its files read."""

    job: Job
    photo: UInt8[np.ndarray, "height width 3"]
    pose: FramedPose


def read_table(path: str | Path) -> list[Job]:
    """Jobs from a csv with the columns image, pose and output; paths are as seen from here.

    Raises:
        InputError: If there is no such file, a column is missing, or two rows have one output.
    """
    try:
        with Path(path).open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            missing = set(COLUMNS) - set(reader.fieldnames or ())
            if missing:
                raise InputError(
                    f"{path}: has no column {', '.join(sorted(missing))}; the first line must be "
                    f"{','.join(COLUMNS)}"
                )
            jobs = [
                Job(**{column: (row[column] or "").strip() for column in COLUMNS}, row=index)
                for index, row in enumerate(reader)
            ]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: cannot be read as a table ({error})") from error
    rows_of = defaultdict(list)
    for job in jobs:
        if job.output:
            rows_of[Path(job.output).resolve()].append(job.output)
    if shared := [outputs[0] for outputs in rows_of.values() if len(outputs) > 1]:
        raise InputError(
            f"{path}: {len(shared)} outputs stand in several rows, such as {shared[0]}"
        )
    return jobs


class FailureTable:
    """The rows left out and why, as a table that can be run again; one of an older run goes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.count = 0
        path.unlink(missing_ok=True)

    def add(self, job: Job, reason: str) -> None:
        """Write a row at once, so that it is known however the run ends."""
        logger.error("row %d: %s", job.row + 1, reason)
        with self.path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            if not self.count:
                writer.writerow((*COLUMNS, "reason"))
            writer.writerow((job.image, job.pose, job.output, reason))
        self.count += 1


def read_inputs(job: Job, sampling: Sampling, estimator: Estimator) -> Inputs:
    """Read the photo and the pose of a job; the estimator finds the person of a pose photo.

    Raises:
        InputError: If a file is missing, is none of the known formats, or shows no person.
        PoseNetworkError: If the estimator cannot be had.
    """
    if not (job.image and job.pose and job.output):
        raise InputError(f"a cell is empty; fill in {', '.join(COLUMNS)}")
    check_output(job.output)
    photo = read_photo(job.image)
    return Inputs(job, photo, read_fitted_pose(job.pose, photo, sampling, estimator))


def run_jobs(
    pipeline: CFLDPipeline,
    jobs: Sequence[Job],
    sampling: Sampling,
    estimator: Estimator,
    failures: FailureTable,
) -> None:
    """Generate what is not there yet; bad rows, and results that can't be written, are failures."""
    todo = [job for job in jobs if not (job.output and Path(job.output).is_file())]
    logger.info("%d images to generate, %d are there already", len(todo), len(jobs) - len(todo))
    readable = _read_all(todo, sampling, estimator, failures)
    num_done = 0
    while batch := list(islice(readable, sampling.batch_size)):
        for inputs, image in zip(batch, generate_batch(pipeline, batch, sampling), strict=True):
            try:
                save_image(image, Path(inputs.job.output))
                num_done += 1
            except OSError as error:  # noqa: PERF203  # each row fails alone
                failures.add(inputs.job, f"{inputs.job.output}: cannot be written ({error})")
        logger.info("%d of %d generated, %d failed", num_done, len(todo), failures.count)


def generate_batch(
    pipeline: CFLDPipeline, batch: Sequence[Inputs], sampling: Sampling
) -> list[Image.Image]:
    """Generate the images of a batch."""
    (images,) = pipeline(
        [inputs.photo for inputs in batch],
        [inputs.pose for inputs in batch],
        **sampling.arguments,
        generator=sampling.generators(inputs.job.row for inputs in batch),
        return_dict=False,
    )
    pictures: list[Image.Image] = images
    return pictures


def _read_all(
    jobs: Sequence[Job], sampling: Sampling, estimator: Estimator, failures: FailureTable
) -> Iterator[Inputs]:
    for job in jobs:
        try:
            yield read_inputs(job, sampling, estimator)
        except InputError as error:  # noqa: PERF203  # each row fails alone
            failures.add(job, str(error))
