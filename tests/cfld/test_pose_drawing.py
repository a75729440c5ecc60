import io
import math

import cv2
import numpy as np
import pytest
from PIL import Image

from cfld.pose import JOINT_COLORS, canvas_points, draw_skeleton, is_found
from cfld.pose_drawing import read_drawing
from preprocessing.figures import draw_figure, pose_figure

FRAME = (256, 176)


def keypoints_of(person):
    return pose_figure(person, 0, size=FRAME, seed=1)[0]


def expected_points(keypoints, size):
    """Whole pixels of the joints that lie on the canvas."""
    points = canvas_points(keypoints, FRAME, size)
    inside = (points >= 0).all(axis=1) & (points < np.array(size[::-1])).all(axis=1)
    return points, is_found(keypoints) & inside


@pytest.mark.parametrize("size", [(256, 256), (512, 512), (256, 176)])
def test_own_drawings_come_back_exactly(size):
    num_joints = num_read = 0
    for person in range(20):
        points, drawn = expected_points(keypoints_of(person), size)
        read = read_drawing(draw_skeleton(keypoints_of(person), FRAME, size))
        found = is_found(read)
        assert not (found & ~drawn).any()
        np.testing.assert_array_equal(read[found, :2], points[found])
        num_joints, num_read = num_joints + drawn.sum(), num_read + found.sum()
    assert num_read > 0.98 * num_joints  # the rest is hidden by other joints


def test_a_jpeg_of_a_drawing_is_read_within_a_pixel():
    buffer = io.BytesIO()
    drawing = draw_skeleton(keypoints_of(0), FRAME)
    Image.fromarray(drawing).save(buffer, "JPEG", quality=90)
    read = read_drawing(np.asarray(Image.open(buffer)))
    points, _ = expected_points(keypoints_of(0), (256, 256))
    found = is_found(read)
    assert found.sum() > 10
    assert np.abs(read[found, :2] - points[found]).max() <= 1


def draw_as_controlnet_aux(keypoints, size):
    """As huggingface/controlnet_aux: ellipses 8 px wide in 0.6 of the colours, radius 4."""
    limbs = ((1, 2), (1, 5), (2, 3), (3, 4), (5, 6), (6, 7), (1, 8), (8, 9), (9, 10), (1, 11))
    limbs += ((11, 12), (12, 13), (1, 0), (0, 14), (14, 16), (0, 15), (15, 17))
    canvas = np.zeros((*size, 3), dtype=np.uint8)
    points, drawn = expected_points(keypoints, size)
    for (start, end), color in zip(limbs, JOINT_COLORS, strict=False):
        if drawn[start] and drawn[end]:
            (x1, y1), (x2, y2) = points[start].tolist(), points[end].tolist()
            angle = int(math.degrees(math.atan2(y1 - y2, x1 - x2)))
            axes = (int(math.hypot(x1 - x2, y1 - y2) / 2), 4)
            middle = (int((x1 + x2) / 2), int((y1 + y2) / 2))
            polygon = cv2.ellipse2Poly(middle, axes, angle, 0, 360, 1)
            cv2.fillConvexPoly(canvas, polygon, [int(c * 0.6) for c in color])
    for joint in np.flatnonzero(drawn):
        cv2.circle(canvas, points[joint].tolist(), 4, JOINT_COLORS[joint], thickness=-1)
    return canvas


def test_drawings_of_controlnet_aux_are_read():
    for person in range(10):
        points, drawn = expected_points(keypoints_of(person), (512, 352))
        read = read_drawing(draw_as_controlnet_aux(keypoints_of(person), (512, 352)))
        found = is_found(read)
        assert found.sum() >= drawn.sum() - 1
        assert np.abs(read[found, :2] - points[found]).max() <= 1


def test_what_is_no_drawing_of_one_person_is_refused():
    photo = draw_figure(0, 0, size=FRAME, seed=1).image
    one = draw_skeleton(keypoints_of(0), FRAME, FRAME)
    other = draw_skeleton(keypoints_of(1), FRAME, FRAME)
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    for picture in (photo, noise, np.zeros_like(photo), photo // 8, np.hstack([one, other])):
        assert read_drawing(picture) is None
