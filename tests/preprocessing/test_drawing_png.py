"""Drawings survive their own PNG encoder, for all decoders, in fewer bytes than Pillow's."""

import io

import cv2
import numpy as np
import pytest
from PIL import Image

from cfld.images import encode_png
from cfld.pose import draw_skeleton
from preprocessing.drawing_png import encode_drawing

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("size", [(256, 256), (1, 1), (3, 7), (64, 48)])
def test_decoders_give_back_the_pixels(size: tuple[int, int]) -> None:
    image = RNG.integers(0, 256, (*size, 3), np.uint8)
    data = encode_drawing(image)
    with Image.open(io.BytesIO(data)) as opened:
        assert (opened.format, opened.mode) == ("PNG", "RGB")
        np.testing.assert_array_equal(np.asarray(opened), image)
    by_opencv = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    np.testing.assert_array_equal(by_opencv[..., ::-1], image)


def test_a_skeleton_takes_fewer_bytes_than_by_pillow() -> None:
    points = RNG.uniform(20, 200, (18, 2))
    keypoints = np.concatenate([points, np.ones((18, 1))], axis=1).astype(np.float32)
    skeleton = draw_skeleton(keypoints, (256, 256))
    assert len(encode_drawing(skeleton)) < len(encode_png(skeleton))
