"""Photo, pose and output of many images to generate, from a table; run in batches, resumable."""

from __future__ import annotations

import csv
import logging
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image

from cfld.images import ImageError, decode_image
from cfld.keypoints import BadRow, KeypointsError, main_person, read_keypoints, read_pose
from cfld.openpose import PoseNetworkError
from cfld.pipeline import CFLDPipeline
from cfld.pipeline_inputs import Estimator, FramedPose, Size, find_person, fit_frame
from cfld.pose_network import PersonPose, PoseEstimator, PoseEstimatorConfig
from cfld.whole_file import whole_file

logger = logging.getLogger(__name__)

COLUMNS = ("image", "pose", "output")
# Pillow knows more formats, but many of them it only reads, or writes without colours.
_FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP", ".gif": "GIF",
            ".bmp": "BMP", ".tif": "TIFF", ".tiff": "TIFF", ".ppm": "PPM"}  # fmt: skip
_KEYPOINT_FILE = re.compile(r".+\.(csv|json)(:.+)?", re.IGNORECASE)


class LazyEstimator:
    """A pose estimator whose network is loaded when the first photo needs it."""

    def __init__(self, config: PoseEstimatorConfig) -> None:
        self.config = config

    def estimate(self, images: Sequence[UInt8[np.ndarray, "_ _ 3"]]) -> list[PersonPose]:
        """The main person of each RGB photo."""
        return self._estimator.estimate(images)

    @cached_property
    def _estimator(self) -> PoseEstimator:
        return PoseEstimator(self.config)


class JobError(ValueError):
    """What is wrong with one image to generate, or with the table of them."""


@dataclass(frozen=True)
class Job:
    """One image to generate; `row` counts from 0 and shifts the seed."""

    image: str
    pose: str
    output: str
    row: int = 0


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How images are generated."""

    num_steps: int = 50
    pose_scale: float = 2.0
    appearance_scale: float = 2.0
    seed: int = 0
    """Of row 0; row i has seed + i, so that no image depends on the batch it is in."""
    size: Size | None = None
    """Height and width of the results; None: of each photo."""
    pose_frame: Size | None = None
    """What keypoints in files refer to; None: each photo's size."""
    batch_size: int = 8

    @property
    def arguments(self) -> dict[str, Any]:
        """What the pipeline takes for all images."""
        height, width = self.size or (None, None)
        return {
            "height": height,
            "width": width,
            "num_inference_steps": self.num_steps,
            "pose_guidance_scale": self.pose_scale,
            "appearance_guidance_scale": self.appearance_scale,
        }

    def generators(self, rows: Iterable[int]) -> list[torch.Generator]:
        """A generator for each of these rows."""
        return [torch.Generator().manual_seed(self.seed + row) for row in rows]


@dataclass(frozen=True)
class Inputs:
    """A job with its files read."""

    job: Job
    photo: UInt8[np.ndarray, "height width 3"]
    pose: FramedPose


def read_table(path: str | Path) -> list[Job]:
    """Jobs from a csv with the columns image, pose and output; paths are as seen from here.

    Raises:
        JobError: If there is no such file, a column is missing, or two rows have one output.
    """
    try:
        with Path(path).open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            missing = set(COLUMNS) - set(reader.fieldnames or ())
            if missing:
                raise JobError(
                    f"{path}: has no column {', '.join(sorted(missing))}; the first line must be "
                    f"{','.join(COLUMNS)}"
                )
            jobs = [
                Job(**{column: (row[column] or "").strip() for column in COLUMNS}, row=index)
                for index, row in enumerate(reader)
            ]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise JobError(f"{path}: cannot be read as a table ({error})") from error
    rows_of = defaultdict(list)
    for job in jobs:
        if job.output:
            rows_of[Path(job.output).resolve()].append(job.output)
    if shared := [outputs[0] for outputs in rows_of.values() if len(outputs) > 1]:
        raise JobError(f"{path}: {len(shared)} outputs stand in several rows, such as {shared[0]}")
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
        JobError: If a file is missing, is none of the known formats, or shows no person.
        PoseNetworkError: If the estimator cannot be had.
    """
    if not (job.image and job.pose and job.output):
        raise JobError(f"a cell is empty; fill in {', '.join(COLUMNS)}")
    check_output(job.output)
    photo = read_photo(job.image)
    size = sampling.size or photo.shape[:2]
    pose = read_framed_pose(job.pose, sampling.pose_frame or photo.shape[:2], estimator)
    return Inputs(job, photo, fit_frame(pose, size))


def check_output(output: str) -> None:
    """Refuse a name that no picture can be written under.

    Raises:
        JobError: If it ends in no image format of ours, or is a folder's.
    """
    if Path(output).suffix.lower() not in _FORMATS:
        raise JobError(f"{output}: ends in no image format; use .png or .jpg")
    if Path(output).is_dir():
        raise JobError(f"{output}: is a folder; name a file")


def read_framed_pose(spec: str, frame: Size, estimator: Estimator) -> FramedPose:
    """Read a pose; `frame` is the size of the picture that keypoints in files refer to.

    Raises:
        JobError: If a file is missing, is none of the known formats, or shows no person.
        PoseNetworkError: If the estimator cannot be had.
    """
    try:
        if _KEYPOINT_FILE.fullmatch(spec):
            return FramedPose(read_pose(spec), frame)
        return find_person(read_photo(spec), estimator)
    except (JobError, PoseNetworkError):
        raise
    except FileNotFoundError as error:
        raise JobError(f"{spec}: no such file") from error
    except (OSError, ValueError) as error:
        is_named = isinstance(error, KeypointsError)
        raise JobError(str(error) if is_named else f"{spec}: {error}") from error


def read_all_poses(spec: str, frame: Size, estimator: Estimator) -> list[FramedPose]:
    """Read one pose, or those of all images that a keypoint file without a :NAME lists.

    Raises:
        JobError: As `read_framed_pose`, or if one of the images has no pose.
        PoseNetworkError: If the estimator cannot be had.
    """
    if not (_KEYPOINT_FILE.fullmatch(spec) and Path(spec).is_file()):
        return [read_framed_pose(spec, frame, estimator)]
    poses = []
    try:
        for entry in read_keypoints(spec):
            if isinstance(entry, BadRow):
                raise JobError(f"{spec}: row {entry.row}: {entry.reason}")
            main = main_person(entry.people)
            if main is None:
                raise JobError(f"{spec}: lists nobody with any joint for {entry.name!r}")
            poses.append(FramedPose(entry.people[main], frame))
    except ValueError as error:
        is_named = isinstance(error, (KeypointsError, JobError))
        raise JobError(str(error) if is_named else f"{spec}: {error}") from error
    if not poses:
        raise JobError(f"{spec}: lists no image")
    return poses


def read_photo(path: str) -> UInt8[np.ndarray, "height width 3"]:
    """An image file as RGB.

    Raises:
        JobError: If it is missing or no image.
    """
    try:
        return decode_image(Path(path).read_bytes())
    except FileNotFoundError as error:
        raise JobError(f"{path}: no such file") from error
    except (OSError, ImageError) as error:
        raise JobError(f"{path}: cannot be read as an image ({error})") from error


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


def save_image(image: Image.Image, path: Path, **options: Any) -> None:
    """Write a picture under its name once it is whole; `options` are Pillow's."""
    with whole_file(path) as unfinished:
        image.save(unfinished, format=_FORMATS[path.suffix.lower()], quality=95, **options)


def _read_all(
    jobs: Sequence[Job], sampling: Sampling, estimator: Estimator, failures: FailureTable
) -> Iterator[Inputs]:
    for job in jobs:
        try:
            yield read_inputs(job, sampling, estimator)
        except JobError as error:  # noqa: PERF203  # each row fails alone
            failures.add(job, str(error))
