"""What users give to commands and what they get: photos and poses read, pictures written."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from cfld.images import ImageError, decode_image
from cfld.keypoints import BadRow, KeypointsError, main_person, read_keypoints, read_pose
from cfld.openpose import PoseNetworkError
from cfld.pipeline_inputs import Estimator, FramedPose, Size, find_person, fit_frame
from cfld.pose_network import PersonPose, PoseEstimator, PoseEstimatorConfig
from cfld.sampling import Sampling
from cfld.whole_file import whole_file

# Pillow knows more formats, but many of them it only reads, or writes without colours.
_FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP", ".gif": "GIF",
            ".bmp": "BMP", ".tif": "TIFF", ".tiff": "TIFF", ".ppm": "PPM"}  # fmt: skip
_KEYPOINT_FILE = re.compile(r".+\.(csv|json)(:.+)?", re.IGNORECASE)


class InputError(ValueError):
    """What is wrong with a file, a name or an option that a user gave."""


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


def check_output(output: str) -> None:
    """Refuse a name that no picture can be written under.

    Raises:
        InputError: If it ends in no image format of ours, or is a folder's.
    """
    if Path(output).suffix.lower() not in _FORMATS:
        raise InputError(f"{output}: ends in no image format; use .png or .jpg")
    if Path(output).is_dir():
        raise InputError(f"{output}: is a folder; name a file")


def read_photo(path: str) -> UInt8[np.ndarray, "height width 3"]:
    """An image file as RGB.

    Raises:
        InputError: If it is missing or no image.
    """
    try:
        return decode_image(Path(path).read_bytes())
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file") from error
    except (OSError, ImageError) as error:
        raise InputError(f"{path}: cannot be read as an image ({error})") from error


def read_fitted_pose(
    spec: str, photo: UInt8[np.ndarray, "_ _ 3"], sampling: Sampling, estimator: Estimator
) -> FramedPose:
    """Read a pose for the person of a photo, in a frame of the result's shape.

    Raises:
        InputError, PoseNetworkError: As `read_framed_pose`.
    """
    frame = sampling.pose_frame or photo.shape[:2]
    pose = read_framed_pose(spec, frame, estimator)
    return fit_frame(pose, sampling.size or photo.shape[:2])


def read_framed_pose(spec: str, frame: Size, estimator: Estimator) -> FramedPose:
    """Read a pose; `frame` is the size of the picture that keypoints in files refer to.

    Raises:
        InputError: If a file is missing, is none of the known formats, or shows no person.
        PoseNetworkError: If the estimator cannot be had.
    """
    try:
        if _KEYPOINT_FILE.fullmatch(spec):
            return FramedPose(read_pose(spec), frame)
        return find_person(read_photo(spec), estimator)
    except (InputError, PoseNetworkError):
        raise
    except FileNotFoundError as error:
        raise InputError(f"{spec}: no such file") from error
    except (OSError, ValueError) as error:
        is_named = isinstance(error, KeypointsError)
        raise InputError(str(error) if is_named else f"{spec}: {error}") from error


def read_all_poses(spec: str, frame: Size, estimator: Estimator) -> list[FramedPose]:
    """Read one pose, or those of all images that a keypoint file without a :NAME lists.

    Raises:
        InputError: As `read_framed_pose`, or if one of the images has no pose.
        PoseNetworkError: If the estimator cannot be had.
    """
    if not (_KEYPOINT_FILE.fullmatch(spec) and Path(spec).is_file()):
        return [read_framed_pose(spec, frame, estimator)]
    poses = []
    try:
        for entry in read_keypoints(spec):
            if isinstance(entry, BadRow):
                raise InputError(f"{spec}: row {entry.row}: {entry.reason}")
            main = main_person(entry.people)
            if main is None:
                raise InputError(f"{spec}: lists nobody with any joint for {entry.name!r}")
            poses.append(FramedPose(entry.people[main], frame))
    except ValueError as error:
        is_named = isinstance(error, (KeypointsError, InputError))
        raise InputError(str(error) if is_named else f"{spec}: {error}") from error
    if not poses:
        raise InputError(f"{spec}: lists no image")
    return poses


def save_image(image: Image.Image, path: Path, **options: Any) -> None:
    """Write a picture under its name once it is whole; `options` are Pillow's."""
    with whole_file(path) as unfinished:
        image.save(unfinished, format=_FORMATS[path.suffix.lower()], quality=95, **options)
