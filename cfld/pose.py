"""Pose maps: keypoints drawn as the skeleton and the 18 heatmaps that condition the model."""

from __future__ import annotations

import cv2
import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float, Float32, Int, UInt8
from torch import Tensor

NUM_JOINTS = 18
JOINT_NAMES = (
    "nose", "neck",
    "right_shoulder", "right_elbow", "right_wrist",
    "left_shoulder", "left_elbow", "left_wrist",
    "right_hip", "right_knee", "right_ankle",
    "left_hip", "left_knee", "left_ankle",
    "right_eye", "left_eye", "right_ear", "left_ear",
)  # fmt: skip

# The authors' drawing order; OpenPose's two shoulder-ear bones are not drawn.
BONES = (
    (1, 2), (1, 5), (2, 3), (3, 4), (5, 6), (6, 7), (1, 8), (8, 9), (9, 10),
    (1, 11), (11, 12), (12, 13), (1, 0), (0, 14), (14, 16), (0, 15), (15, 17),
)  # fmt: skip

JOINT_COLORS = (
    (255, 0, 0), (255, 85, 0), (255, 170, 0), (255, 255, 0), (170, 255, 0), (85, 255, 0),
    (0, 255, 0), (0, 255, 85), (0, 255, 170), (0, 255, 255), (0, 170, 255), (0, 85, 255),
    (0, 0, 255), (85, 0, 255), (170, 0, 255), (255, 0, 255), (255, 0, 170), (255, 0, 85),
)  # fmt: skip
BONE_COLORS = tuple((r * 3 // 5, g * 3 // 5, b * 3 // 5) for r, g, b in JOINT_COLORS[: len(BONES)])

MISSING_JOINT = (np.nan, np.nan, 0.0)  # of a joint that was not found: x, y, score

POSE_MAP_SIZE = (256, 256)
POSE_MAP_CHANNELS = 3 + NUM_JOINTS
# At a canvas 256 high; they scale with it.
BONE_THICKNESS_PX = 2
JOINT_RADIUS_PX = 3
SIGMA_PX = 6.0

# Far outside any canvas: exp() of it is exactly 0, so a missing joint needs no mask.
_NOWHERE = -(10**6)


def is_found(keypoints: Float[np.ndarray, "*batch 18 3"]) -> np.ndarray:
    """Tell which joints were found, `[..., 18]`: those whose coordinates are finite."""
    return np.isfinite(keypoints[..., :2]).all(axis=-1)


def mark_missing(points: Float[np.ndarray, "*batch 3"]) -> Float32[np.ndarray, "*batch 3"]:
    """Replace points without a positive score or with a number that is not finite."""
    is_there = (points[..., 2:] > 0) & np.isfinite(points).all(axis=-1, keepdims=True)
    return np.where(is_there, points, MISSING_JOINT).astype(np.float32)


def canvas_points(
    keypoints: Float[np.ndarray, "*batch 18 3"],
    frame: tuple[int, int],
    size: tuple[int, int] = POSE_MAP_SIZE,
) -> Int[np.ndarray, "*batch 18 2"]:
    """Map keypoints from their frame (height, width) to whole canvas pixels (x, y).

    Coordinates are scaled and truncated towards zero, as the authors do. A missing joint lies far
    outside of the canvas.
    """
    found = is_found(keypoints)[..., None]
    scaled = keypoints[..., :2].astype(np.float64) * (size[1], size[0]) / (frame[1], frame[0])
    return np.where(found, np.trunc(np.where(found, scaled, 0)), _NOWHERE).astype(np.int64)


def draw_skeleton(
    keypoints: Float[np.ndarray, "18 3"],
    frame: tuple[int, int],
    size: tuple[int, int] = POSE_MAP_SIZE,
) -> UInt8[np.ndarray, "height width 3"]:
    """Draw the RGB skeleton of keypoints that refer to a frame of (height, width)."""
    return draw_bones(canvas_points(keypoints, frame, size), size)


def draw_bones(
    points: Int[np.ndarray, "18 2"], size: tuple[int, int] = POSE_MAP_SIZE
) -> UInt8[np.ndarray, "height width 3"]:
    """Draw the RGB skeleton of canvas points: 17 bones, then 18 joints, all anti-aliased, on black.

    A bone needs both of its joints. Equal to the authors' drawing to the bit, so that their
    checkpoints understand it.
    """
    thickness = max(1, round(BONE_THICKNESS_PX * size[0] / POSE_MAP_SIZE[0]))
    radius = max(1, round(JOINT_RADIUS_PX * size[0] / POSE_MAP_SIZE[0]))
    places = points.tolist()
    found = [x != _NOWHERE for x, _ in places]
    canvas = np.zeros((*size, 3), dtype=np.uint8)
    for (start, end), color in zip(BONES, BONE_COLORS, strict=True):
        if found[start] and found[end]:
            cv2.line(canvas, places[start], places[end], color, thickness, cv2.LINE_AA)
    for joint, place in enumerate(places):
        if found[joint]:
            cv2.circle(canvas, place, radius, JOINT_COLORS[joint], -1, cv2.LINE_AA)
    return canvas


def draw_heatmaps(
    points: Int[Tensor, "batch joints 2"],
    size: tuple[int, int] = POSE_MAP_SIZE,
    *,
    out: Float[Tensor, "batch joints {size[0]} {size[1]}"] | None = None,
) -> Float[Tensor, "batch joints {size[0]} {size[1]}"]:
    """Draw a Gaussian with peak 1 at each canvas point (x, y), on the points' device.

    A two-dimensional Gaussian is the outer product of two one-dimensional ones, so only
    height + width exponentials are computed per joint. Missing joints give zeros. Sigma is 6 px
    on a canvas 256 high. With `out`, results are written there in its dtype.
    """
    height, width = size
    sigma_px = SIGMA_PX * height / POSE_MAP_SIZE[0]
    x, y = points.to(torch.float32).unsqueeze(-1).unbind(-2)
    columns = torch.arange(width, device=points.device)
    rows = torch.arange(height, device=points.device)
    across = torch.exp(-((columns - x) ** 2) / (2 * sigma_px**2))
    down = torch.exp(-((rows - y) ** 2) / (2 * sigma_px**2))
    if out is not None:
        across, down = across.to(out.dtype), down.to(out.dtype)
    return torch.mul(down[..., :, None], across[..., None, :], out=out)


def make_pose_maps(
    skeletons: UInt8[Tensor, "batch height width 3"],
    points: Int[Tensor, "batch 18 2"],
    dtype: torch.dtype = torch.float32,
) -> Float[Tensor, "batch 21 height width"]:
    """Join drawn skeletons and heatmaps to the model's pose input, values in [0, 1].

    Source: the authors' 21-channel pose image (skeleton / 255, then one heatmap per joint).
    """
    batch, height, width, _ = skeletons.shape
    maps = torch.empty(
        (batch, POSE_MAP_CHANNELS, height, width), dtype=dtype, device=skeletons.device
    )
    maps[:, :3] = rearrange(skeletons, "batch height width rgb -> batch rgb height width")
    maps[:, :3] /= 255
    draw_heatmaps(points, (height, width), out=maps[:, 3:])
    return maps


def draw_pose_map(
    keypoints: Float[np.ndarray, "18 3"],
    frame: tuple[int, int],
    size: tuple[int, int] = POSE_MAP_SIZE,
) -> Float[Tensor, "21 height width"]:
    """Draw the pose map of one person; `frame` is the (height, width) of the keypoints."""
    skeleton = torch.from_numpy(draw_skeleton(keypoints, frame, size))
    points = torch.from_numpy(canvas_points(keypoints, frame, size))
    return make_pose_maps(skeleton[None], points[None])[0]
