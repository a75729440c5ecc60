import math

import cv2
import numpy as np
import pytest
import torch

from cfld.images import decode_image, encode_png
from cfld.pose import (
    BONE_COLORS,
    BONES,
    JOINT_COLORS,
    NUM_JOINTS,
    canvas_points,
    draw_heatmaps,
    draw_pose_map,
    draw_skeleton,
    make_pose_maps,
)


def random_keypoints(seed: int, frame: tuple[int, int] = (256, 176)) -> np.ndarray:
    """Whole-pixel keypoints as in the published csv, some missing, some outside of the frame."""
    rng = np.random.default_rng(seed)
    keypoints = np.ones((NUM_JOINTS, 3), np.float32)
    keypoints[:, 0] = rng.integers(0, frame[1] + 8, NUM_JOINTS)
    keypoints[:, 1] = rng.integers(0, frame[0] + 8, NUM_JOINTS)
    keypoints[rng.random(NUM_JOINTS) < 0.2] = (np.nan, np.nan, 0)
    return keypoints


def reference_heatmaps(keypoints: np.ndarray, frame: tuple[int, int], size: tuple[int, int]):
    """The formula of the facts document, evaluated over the full grid in float64."""
    maps = np.zeros((NUM_JOINTS, *size))
    rows, columns = np.mgrid[: size[0], : size[1]]
    for joint, (x, y, _) in enumerate(keypoints):
        if not math.isnan(x):
            x_px, y_px = int(x / frame[1] * size[1]), int(y / frame[0] * size[0])
            maps[joint] = np.exp(-((rows - y_px) ** 2 + (columns - x_px) ** 2) / (2 * 6**2))
    return maps


def reference_skeleton(keypoints: np.ndarray, frame: tuple[int, int], size: tuple[int, int]):
    canvas = np.zeros((*size, 3), np.uint8)
    scale_x, scale_y = size[1] / frame[1], size[0] / frame[0]
    pixel = [
        None if math.isnan(x) else (int(x * scale_x), int(y * scale_y)) for x, y, _ in keypoints
    ]
    for bone, (start, end) in enumerate(BONES):
        if pixel[start] is not None and pixel[end] is not None:
            cv2.line(canvas, pixel[start], pixel[end], BONE_COLORS[bone], 2, cv2.LINE_AA)
    for joint, point in enumerate(pixel):
        if point is not None:
            cv2.circle(canvas, point, 3, JOINT_COLORS[joint], -1, cv2.LINE_AA)
    return canvas


@pytest.mark.parametrize("frame", [(256, 176), (128, 64), (256, 256), (1101, 750)])
def test_pose_map_equals_the_authors_formula(frame):
    for seed in range(5):
        keypoints = random_keypoints(seed, frame)
        pose_map = draw_pose_map(keypoints, frame).numpy()
        skeleton = reference_skeleton(keypoints, frame, (256, 256)).transpose(2, 0, 1)
        np.testing.assert_array_equal(np.rint(pose_map[:3] * 255), skeleton)
        reference = reference_heatmaps(keypoints, frame, (256, 256))
        np.testing.assert_allclose(pose_map[3:], reference, atol=1e-6)


@pytest.mark.parametrize("stored", [(512, 512), (1101, 750), (256, 176)])
def test_published_keypoints_survive_the_stored_image_exactly(stored):
    """Scaled to a stored image in float32 and then to the canvas: still the authors' pixel."""
    x, y = np.meshgrid(np.arange(180), np.arange(256))
    grid = np.stack([x, y, np.ones_like(x)], -1).reshape(-1, 18, 3).astype(np.float32)
    scaled = grid.astype(np.float64)
    scaled[..., 0] = scaled[..., 0] * stored[1] / 176
    scaled[..., 1] = scaled[..., 1] * stored[0] / 256
    direct = canvas_points(grid, (256, 176))
    np.testing.assert_array_equal(canvas_points(scaled.astype(np.float32), stored), direct)


def test_skeleton_png_equals_drawing():
    skeleton = draw_skeleton(random_keypoints(3), (256, 176))
    np.testing.assert_array_equal(decode_image(encode_png(skeleton)), skeleton)


def test_bone_colors_are_dimmed_joint_colors():
    assert BONE_COLORS[1] == (153, 51, 0)
    assert BONE_COLORS[15] == (153, 0, 153)
    assert len(BONES) == 17


def test_missing_joints_leave_no_trace():
    keypoints = np.full((NUM_JOINTS, 3), np.nan, np.float32)
    assert not draw_pose_map(keypoints, (256, 256)).any()


def test_a_batch_equals_its_images_one_by_one():
    frame = (256, 176)
    keypoints = np.stack([random_keypoints(seed) for seed in range(4)])
    skeletons = torch.from_numpy(np.stack([draw_skeleton(k, frame) for k in keypoints]))
    batch = make_pose_maps(skeletons, torch.from_numpy(canvas_points(keypoints, frame)))
    for row, one in zip(batch, keypoints, strict=True):
        torch.testing.assert_close(row, draw_pose_map(one, frame), rtol=0, atol=0)


def test_heatmap_width_scales_with_the_canvas():
    points = torch.tensor([[[32, 32]]])
    small, large = draw_heatmaps(points, (64, 64)), draw_heatmaps(points * 4, (256, 256))
    torch.testing.assert_close(small, large[..., ::4, ::4])


def test_half_precision_pose_maps_stay_close():
    keypoints = random_keypoints(1)
    points = torch.from_numpy(canvas_points(keypoints, (256, 176)))[None]
    skeleton = torch.from_numpy(draw_skeleton(keypoints, (256, 176)))[None]
    half = make_pose_maps(skeleton, points, dtype=torch.float16)
    torch.testing.assert_close(half.float(), make_pose_maps(skeleton, points), atol=1e-3, rtol=0)
