"""Parts of the body as masks, drawn around keypoints: where to edit when nobody gives a mask."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from jaxtyping import Bool, Float, UInt8

from cfld.pose import JOINT_NAMES, is_found

Point = Float[np.ndarray, " xy"]

_FACE = ("nose", "right_eye", "left_eye", "right_ear", "left_ear")
_NECK_TO_HEAD = 0.42  # in torso lengths, where no point of the face is there


@dataclass(frozen=True)
class _Shape:
    """A line along joints, or the area between them, with a margin around in torso lengths."""

    joints: tuple[str, ...]
    margin: float
    is_filled: bool = False


def _limb(names: Sequence[str], margin: float) -> tuple[_Shape, ...]:
    return tuple(
        _Shape(tuple(f"{side}_{name}" for name in names), margin) for side in ("right", "left")
    )


_SHAPES: dict[str, tuple[_Shape, ...]] = {
    "head": (_Shape(("head",), 0.36),),
    "torso": (
        _Shape(("right_shoulder", "left_shoulder", "left_waist", "right_waist"), 0.16, True),
    ),
    "arms": _limb(("shoulder", "elbow", "wrist"), 0.16),
    "legs": (*_limb(("hip", "knee", "ankle"), 0.2), _Shape(("right_hip", "left_hip"), 0.2)),
}
REGIONS = tuple(_SHAPES)

# Lengths between joints times these factors are torso lengths in a standing person seen from the
# front; any other view only shortens them.
_TORSO_LENGTHS = {
    ("neck", "right_hip"): 1.0,
    ("neck", "left_hip"): 1.0,
    ("right_shoulder", "left_shoulder"): 1.2,
    ("right_hip", "right_knee"): 1.1,
    ("left_hip", "left_knee"): 1.1,
    ("right_knee", "right_ankle"): 1.1,
    ("left_knee", "left_ankle"): 1.1,
    ("right_shoulder", "right_elbow"): 1.6,
    ("left_shoulder", "left_elbow"): 1.6,
    ("neck", "nose"): 2.2,
}


class RegionError(ValueError):
    """A part of the body that cannot be drawn."""


def draw_regions(
    keypoints: Float[np.ndarray, "18 3"],
    frame: tuple[int, int],
    size: tuple[int, int],
    regions: Sequence[str],
) -> Bool[np.ndarray, "{size[0]} {size[1]}"]:
    """Draw parts of a person (`REGIONS`), clothes included, as a mask.

    Keypoints refer to `frame`, the mask has `size`; both are (height, width). What hangs far off
    the body, such as a wide skirt or long hair, lies outside.

    Raises:
        RegionError: If a region is unknown, or the pose lacks its joints.
    """
    for region in regions:
        if region not in _SHAPES:
            raise RegionError(f"region {region!r} is unknown; choose among {', '.join(REGIONS)}")
    points = _scaled_points(keypoints, np.divide(size, frame)[::-1])
    torso_px = _torso_length(points)
    points |= _head_point(points, torso_px) | _waist_points(points, torso_px)
    mask = np.zeros(size, np.uint8)
    for region in regions:
        drawn = [_draw(mask, shape, points, torso_px) for shape in _SHAPES[region]]
        if not any(drawn):
            raise RegionError(f"the pose has too few joints for the {region}; give a mask")
    return mask > 0


def _scaled_points(
    keypoints: Float[np.ndarray, "18 3"], scale: Float[np.ndarray, " xy"]
) -> dict[str, Point]:
    found = is_found(keypoints)
    return {
        name: point * scale
        for name, point, is_there in zip(JOINT_NAMES, keypoints[:, :2], found, strict=True)
        if is_there
    }


def _torso_length(points: dict[str, Point]) -> float:
    lengths = [
        float(np.linalg.norm(points[start] - points[end])) * factor
        for (start, end), factor in _TORSO_LENGTHS.items()
        if start in points and end in points
    ]
    return max(lengths, default=0.0)


def _head_point(points: dict[str, Point], torso_px: float) -> dict[str, Point]:
    """The middle of the face, or where the head must be above neck and hips seen from behind."""
    if face := [points[joint] for joint in _FACE if joint in points]:
        return {"head": np.mean(face, axis=0)}
    hips = [points[joint] for joint in ("right_hip", "left_hip") if joint in points]
    if "neck" not in points or not hips:
        return {}
    upwards = points["neck"] - np.mean(hips, axis=0)
    return {"head": points["neck"] + upwards * _NECK_TO_HEAD * torso_px / np.linalg.norm(upwards)}


def _waist_points(points: dict[str, Point], torso_px: float) -> dict[str, Point]:
    """The hips, or, where a photo ends above them, a torso's length below the shoulders."""
    hips = {joint: points[joint] for joint in ("right_hip", "left_hip") if joint in points}
    found = {joint.replace("hip", "waist"): point for joint, point in hips.items()}
    return found or {
        joint.replace("shoulder", "waist"): points[joint] + (0, torso_px)
        for joint in ("right_shoulder", "left_shoulder")
        if joint in points
    }


def _draw(
    mask: UInt8[np.ndarray, "height width"],
    shape: _Shape,
    points: dict[str, Point],
    torso_px: float,
) -> bool:
    """Draw the joints of a shape that are there; tell whether they were enough."""
    found = [points[joint] for joint in shape.joints if joint in points]
    if len(found) < min(2, len(shape.joints)) or not torso_px:
        return False
    corners = np.rint(found).astype(np.int32)
    outline = cv2.convexHull(corners) if shape.is_filled else corners
    if shape.is_filled:
        cv2.fillConvexPoly(mask, outline, 1)
    is_closed = shape.is_filled or len(outline) == 1  # a single point is drawn as a disc then
    cv2.polylines(mask, [outline], is_closed, 1, max(1, round(2 * shape.margin * torso_px)))
    return True
