"""What users hand to the pipeline (pictures, keypoints, pose maps) in the forms the model takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float, Float32, UInt8
from PIL import Image
from torch import Generator, Tensor

from cfld.images import resize_image, to_floats
from cfld.pose import NUM_JOINTS, POSE_MAP_CHANNELS, draw_pose_map, is_found
from cfld.pose_drawing import read_drawing
from cfld.pose_network import PersonPose

Picture = Image.Image | np.ndarray | Tensor
Size = tuple[int, int]

_MARGIN = 0.1
_SAME_SHAPE = 0.03


class NoPersonError(ValueError):
    """A photo in which no person was found."""


@runtime_checkable
class Estimator(Protocol):
    """What finds the main person of photos, such as `cfld.pose_network.PoseEstimator`."""

    def estimate(self, images: Sequence[UInt8[np.ndarray, "_ _ 3"]]) -> list[PersonPose]:
        """The main person of each RGB photo."""


@dataclass(frozen=True)
class FramedPose:
    """Keypoints, and the (height, width) of the picture in whose pixels they are.

    Raises:
        ValueError: If no joint is there, or the joints lie outside of the frame by more than a
            tenth of it: then they belong to a picture of another size.
    """

    keypoints: Float32[np.ndarray, "18 3"]
    frame: Size

    def __post_init__(self) -> None:
        points = self.keypoints[is_found(self.keypoints), :2]
        if not len(points):
            raise ValueError("no joint of the pose is there; give another pose")
        limits = np.array(self.frame[::-1])
        if (points < -_MARGIN * limits).any() or (points > (1 + _MARGIN) * limits).any():
            raise ValueError(
                f"joints at x, y from {points.min(axis=0).round().tolist()} to "
                f"{points.max(axis=0).round().tolist()} do not lie in a frame of height, width "
                f"{tuple(self.frame)}; give pose_frame, the size of the picture they belong to"
            )


def check_noise(generator: object, latents: object, shape: tuple[int, ...]) -> None:
    """Refuse what is no source of noise of this shape, one row for each result.

    Raises:
        ValueError: If it has another type, number or shape.
    """
    generators = generator if isinstance(generator, list) else [generator] * shape[0]
    if generator is not None and not all(isinstance(each, Generator) for each in generators):
        raise ValueError(f"generator is {generator!r}; give a torch.Generator, or a list of them")
    if len(generators) != shape[0]:
        raise ValueError(f"{len(generators)} generators for {shape[0]} results")
    found = tuple(latents.shape) if isinstance(latents, Tensor) else type(latents).__name__
    if latents is not None and found != shape:
        raise ValueError(f"latents are {found}, expected a tensor of the shape {shape}")


def read_pictures(image: object) -> list[UInt8[np.ndarray, "_ _ 3"]]:
    """RGB pictures of any size.

    Accepted are PIL images, arrays HWC or NHWC and tensors CHW or NCHW, uint8 or floats in
    [0, 1], and lists of them.

    Raises:
        ValueError: If a picture has another layout or range.
    """
    if isinstance(image, Image.Image):
        return [np.asarray(image.convert("RGB"))]
    if isinstance(image, (list, tuple)):
        return [picture for entry in image for picture in read_pictures(entry)]
    if isinstance(image, Tensor):
        image = image.detach().cpu()
        image = (image.float() if image.is_floating_point() else image).numpy()
        if image.ndim < 3 or image.shape[-3] != 3:
            raise ValueError(f"a tensor of {image.shape} is no picture: 3 channels come first")
        image = rearrange(image, "... c h w -> ... h w c")
    if not isinstance(image, np.ndarray):
        raise ValueError(f"a picture is an image, an array or a tensor, not {type(image).__name__}")
    if image.ndim not in (3, 4) or image.shape[-1] != 3:
        raise ValueError(f"an array of {image.shape} is no picture: 3 channels come last")
    pictures = _as_uint8(image)
    return [pictures] if pictures.ndim == 3 else list(pictures)


def read_sources(
    pictures: Sequence[UInt8[np.ndarray, "_ _ 3"]], size: Size
) -> Float[Tensor, "batch 3 {size[0]} {size[1]}"]:
    """Source images in [-1, 1], resized as in training, without keeping the aspect ratio."""
    resized = np.stack([resize_image(picture, size) for picture in pictures])
    return to_floats(torch.from_numpy(resized))


def read_poses(
    pose: object, frames: Sequence[Size], estimator: Estimator | None = None
) -> list[FramedPose | Float[Tensor, "21 _ _"]]:
    """Poses from keypoints `[18, 3]`, pose maps `[21, h, w]`, drawn skeletons or photos.

    Several come as a list or along a first axis. Each pose's keypoints refer to its frame, or to
    the only frame; a drawing's or photo's own size is used instead.

    Raises:
        ValueError: If a pose is none of these, keypoints have no frame or a photo comes without an
            estimator.
        NoPersonError: If the estimator finds nobody in a photo.
    """
    given = pose if isinstance(pose, (list, tuple)) else [pose]
    poses = [entry for nested in given for entry in _split(nested)]
    if len(set(frames)) == 1:
        frames = [frames[0]] * len(poses)
    read: list[FramedPose | Tensor] = []
    for index, entry in enumerate(poses):
        if isinstance(entry, (FramedPose, Tensor)):
            read.append(entry)
        elif entry.shape != (NUM_JOINTS, 3):
            read.append(find_person(entry, estimator))
        elif len(frames) == len(poses):
            read.append(FramedPose(_marked(entry), frames[index]))
        else:
            raise ValueError(
                f"keypoints need one frame, or one for each of {len(poses)} poses, but the sizes "
                f"of images or frames are {list(frames)}; give pose_frame"
            )
    return read


def find_person(photo: UInt8[np.ndarray, "height width 3"], estimator: object) -> FramedPose:
    """The pose of a drawn skeleton or, by the estimator, of a photo's main person.

    Raises:
        ValueError: If it is no drawn skeleton and there is no estimator.
        NoPersonError: If the estimator finds nobody.
    """
    keypoints = read_drawing(photo)
    if keypoints is None:
        if not isinstance(estimator, Estimator):
            raise ValueError(
                "the pose picture is no skeleton of one person drawn in OpenPose's colours on "
                "black; for a photo give a pose_estimator, whose method is estimate"
            )
        keypoints = estimator.estimate([photo])[0].keypoints
        if not is_found(keypoints).any():
            raise NoPersonError(
                "no person was found in the pose photo; give one that shows a person, or keypoints"
            )
    return FramedPose(keypoints, photo.shape[:2])


def fit_frame(pose: FramedPose, size: Size) -> FramedPose:
    """Crop or widen the frame to the shape of `size` around the person, who keeps its proportions.

    The model sees source, pose and result squashed to one square, so their frames must have one
    shape. Shapes that differ by less than 3 % count as the same: published keypoints do.
    """
    height, width = pose.frame
    ratio = size[1] / size[0]
    if abs(width / height / ratio - 1) < _SAME_SHAPE:
        return pose
    points = pose.keypoints[is_found(pose.keypoints), :2]
    low, high = points.min(axis=0), points.max(axis=0)
    person_width, person_height = (high - low) * (1 + 2 * _MARGIN)
    if width / height > ratio:  # too wide: crop the sides, but not the person
        new_width = max(height * ratio, min(width, float(person_width)))
        new_height = new_width / ratio
    else:
        new_height = max(width / ratio, min(height, float(person_height)))
        new_width = new_height * ratio
    x, y = (low + high) / 2
    corner = _place(float(x), new_width, width), _place(float(y), new_height, height)
    keypoints = pose.keypoints - np.array([*corner, 0], dtype=np.float32)
    return FramedPose(keypoints, (round(new_height), round(new_width)))


def draw_poses(
    poses: Sequence[FramedPose | Float[Tensor, "21 _ _"]], size: Size
) -> Float[Tensor, "batch 21 {size[0]} {size[1]}"]:
    """Pose maps of the wanted size.

    Raises:
        ValueError: If a given pose map has another size.
    """
    for pose in poses:
        if isinstance(pose, Tensor) and tuple(pose.shape[1:]) != tuple(size):
            raise ValueError(
                f"a pose map of {tuple(pose.shape[1:])} is given, the model's are {tuple(size)}"
            )
    return torch.stack(
        [
            pose if isinstance(pose, Tensor) else draw_pose_map(pose.keypoints, pose.frame, size)
            for pose in poses
        ]
    )


def _place(centre: float, window: float, length: int) -> float:
    """Where a window begins: around `centre`, inside of `length` if it is smaller."""
    if window >= length:
        return (length - window) / 2
    return min(max(centre - window / 2, 0.0), length - window)


def _as_uint8(image: np.ndarray) -> UInt8[np.ndarray, "*batch height width 3"]:
    if image.dtype == np.uint8:
        return image
    if not np.issubdtype(image.dtype, np.floating):
        raise ValueError(f"a picture of {image.dtype} is given; use uint8, or floats in [0, 1]")
    if not (image.min() >= 0 and image.max() <= 1):  # also false for NaN
        raise ValueError(
            f"a picture has values from {image.min()} to {image.max()}; floats must be in [0, 1]"
        )
    return np.rint(image * 255).astype(np.uint8)


def _split(pose: object) -> list[np.ndarray | Tensor | FramedPose]:
    """One entry per pose: `[18, 3]` and HWC pictures as arrays, pose maps as tensors."""
    if isinstance(pose, FramedPose):
        return [pose]
    shape = tuple(getattr(pose, "shape", ()))
    if shape[-2:] == (NUM_JOINTS, 3) and len(shape) in (2, 3):
        points = pose.detach().cpu().float() if isinstance(pose, Tensor) else pose
        return list(np.asarray(points, np.float32).reshape(-1, NUM_JOINTS, 3))
    if isinstance(pose, Tensor) and len(shape) in (3, 4) and shape[-3] == POSE_MAP_CHANNELS:
        maps = pose.detach().cpu().float().reshape(-1, *shape[-3:])
        if not ((maps >= 0) & (maps <= 1)).all():  # also false for NaN
            raise ValueError(
                f"a pose map has values from {maps.min():g} to {maps.max():g}, not in [0, 1]"
            )
        return list(maps)
    try:
        return list(read_pictures(pose))
    except ValueError as error:
        raise ValueError(
            f"a pose is keypoints [18, 3], a pose map [21, h, w] as a tensor, a drawn skeleton or "
            f"a photo; {error}"
        ) from error


def _marked(keypoints: Float32[np.ndarray, "18 3"]) -> Float32[np.ndarray, "18 3"]:
    """Joints without finite coordinates or without score are missing."""
    missing = ~is_found(keypoints) | ~(keypoints[:, 2] > 0)
    return np.where(missing[:, None], np.array([np.nan, np.nan, 0], np.float32), keypoints)
