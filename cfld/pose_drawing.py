"""Drawn skeletons back to keypoints: ours, OpenPose's, controlnet-aux's, told by joint colours."""

from __future__ import annotations

import cv2
import numpy as np
from jaxtyping import Bool, Float32, Int, UInt8

from cfld.pose import JOINT_COLORS, MISSING_JOINT, NUM_JOINTS, draw_skeleton

# Neighbouring joint colours differ by 85, a bone is drawn in 0.6 of its joint's colour.
_TOLERANCE = 40
_MIN_SHARE_OF_DISC = 0.25
_MIN_JOINTS = 4
_MIN_EXPLAINED = 0.75
_DARK = 48


def read_drawing(
    image: UInt8[np.ndarray, "height width 3"],
) -> Float32[np.ndarray, "18 3"] | None:
    """Keypoints of one person drawn on black, in the drawing's pixels; None if it is none.

    Joints are discs of one size in OpenPose's colours, later ones over earlier ones. What was
    found is drawn again, and must account for the picture: a photo, several persons or hands
    beside the body are refused.
    """
    drawn = image.max(axis=2) > _DARK
    if not 0 < drawn.mean() < 0.5:
        return None
    nearest = _nearest_joints(image)
    radius_px = _disc_radius(nearest)
    if radius_px is None:
        return None
    keypoints = np.full((NUM_JOINTS, 3), MISSING_JOINT, dtype=np.float32)
    for joint in range(NUM_JOINTS):
        centre = _disc_centre(nearest, joint, radius_px)
        if centre is not None:
            keypoints[joint] = (*centre, 1)
    is_enough = np.isfinite(keypoints[:, 0]).sum() >= _MIN_JOINTS
    return keypoints if is_enough and _explains(keypoints, drawn, radius_px) else None


def _nearest_joints(
    image: UInt8[np.ndarray, "height width 3"],
) -> Int[np.ndarray, "height width"]:
    """The joint in whose colour each pixel is, -1 where it is in none."""
    nearest = np.full(image.shape[:2], -1)
    bright = image.max(axis=2) > 255 - 1.5 * _TOLERANCE
    colors = np.array(JOINT_COLORS, dtype=np.int16)
    distances = np.abs(image[bright].astype(np.int16)[:, None] - colors).max(axis=2)
    nearest[bright] = np.where(distances.min(axis=1) > _TOLERANCE, -1, distances.argmin(axis=1))
    return nearest


def _disc_radius(nearest: Int[np.ndarray, "height width"]) -> float | None:
    """Of the discs, by the median area of each colour's largest patch."""
    areas = []
    for joint in range(NUM_JOINTS):
        _, _, stats, _ = cv2.connectedComponentsWithStats((nearest == joint).astype(np.uint8))
        if len(stats) > 1:
            areas.append(stats[1:, cv2.CC_STAT_AREA].max())
    return float(np.sqrt(np.median(areas) / np.pi)) if len(areas) >= _MIN_JOINTS else None


def _disc_centre(
    nearest: Int[np.ndarray, "height width"], joint: int, radius_px: float
) -> tuple[float, float] | None:
    """Where (x, y) a disc covers most of its colour and nothing that no later disc can cover."""
    own = (nearest == joint).astype(np.float32)
    if not own.any():
        return None
    disc = _disc(radius_px)
    fits = cv2.filter2D(
        own - ((nearest < joint).astype(np.float32)), -1, disc, borderType=cv2.BORDER_CONSTANT
    )
    if fits.max() < _MIN_SHARE_OF_DISC * disc.sum():
        return None
    y, x = np.nonzero(fits > fits.max() - 0.5)
    return float(np.rint(x.mean())), float(np.rint(y.mean()))


def _disc(radius_px: float) -> Float32[np.ndarray, "side side"]:
    reach = int(np.ceil(radius_px))
    across = np.arange(-reach, reach + 1)
    return (across[:, None] ** 2 + across**2 <= radius_px**2).astype(np.float32)


def _explains(
    keypoints: Float32[np.ndarray, "18 3"],
    drawn: Bool[np.ndarray, "height width"],
    radius_px: float,
) -> bool:
    height, width = drawn.shape
    again = draw_skeleton(keypoints, (height, width), (height, width)).max(axis=2)
    around = cv2.dilate(again, _disc(max(1.0, radius_px)).astype(np.uint8)) > _DARK
    return bool((drawn & around).sum() >= _MIN_EXPLAINED * drawn.sum())
