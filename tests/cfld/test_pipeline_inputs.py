import numpy as np
import pytest
import torch
from PIL import Image
from torch import Generator

from cfld.pipeline_inputs import (
    FramedPose,
    NoPersonError,
    check_noise,
    draw_poses,
    find_person,
    fit_frame,
    read_pictures,
    read_poses,
    read_sources,
)
from cfld.pose import draw_pose_map, draw_skeleton
from cfld.pose_network import PersonPose
from preprocessing.figures import draw_figure

FIGURE = draw_figure(0, 0, size=(96, 64), seed=0)


class FixedEstimator:
    """Finds what it is told to find."""

    def __init__(self, keypoints):
        self.keypoints = keypoints

    def estimate(self, images):
        return [PersonPose(self.keypoints, 1) for _ in images]


def test_pictures_of_every_form_are_the_same():
    array = FIGURE.image
    tensor = torch.from_numpy(array).permute(2, 0, 1)
    forms = [
        Image.fromarray(array),
        array,
        array / 255,
        array.astype(np.float32) / 255,
        tensor,
        tensor / 255,
        (tensor / 255)[None],
        array[None],
        [Image.fromarray(array)],
    ]
    for form in forms:
        (picture,) = read_pictures(form)
        np.testing.assert_array_equal(picture, array)
    assert len(read_pictures([array, tensor])) == 2
    assert len(read_pictures(np.stack([array, array]))) == 2


def test_grey_and_transparent_pictures_become_rgb():
    grey = Image.fromarray(FIGURE.image).convert("L")
    assert read_pictures(grey)[0].shape == (96, 64, 3)


@pytest.mark.parametrize(
    ("picture", "message"),
    [
        (np.zeros((4, 4)), "3 channels come last"),
        (np.zeros((4, 4, 4)), "3 channels come last"),
        (torch.zeros(4, 4, 3), "3 channels come first"),
        (np.full((4, 4, 3), 7.0), r"values from 7.0 to 7.0; floats must be in \[0, 1\]"),
        (np.full((4, 4, 3), np.nan), r"floats must be in \[0, 1\]"),
        (np.zeros((4, 4, 3), dtype=np.int64), "picture of int64"),
        ("a.jpg", "not str"),
    ],
)
def test_other_pictures_are_refused(picture, message):
    with pytest.raises(ValueError, match=message):
        read_pictures(picture)


def test_sources_are_squashed_and_scaled():
    source = read_sources([FIGURE.image, FIGURE.image[:50]], (32, 32))
    assert source.shape == (2, 3, 32, 32)
    assert -1 <= source.min() < source.max() <= 1
    unscaled = read_sources([FIGURE.image], (96, 64))[0].permute(1, 2, 0) * 127.5 + 127.5
    np.testing.assert_allclose(unscaled.numpy(), FIGURE.image, atol=1e-4)


def test_poses_of_every_form():
    keypoints = np.floor(FIGURE.keypoints)
    drawing = draw_skeleton(keypoints, (96, 64), (96, 64))
    pose_map = draw_pose_map(keypoints, (96, 64), (32, 32))
    estimator = FixedEstimator(keypoints)
    half = torch.from_numpy(keypoints).bfloat16()  # whole numbers below 256 are exact
    forms = [keypoints, torch.from_numpy(keypoints), half, pose_map, FIGURE.image]
    expected = pose_map[None]
    for form in forms:
        poses = read_poses(form, [(96, 64)], estimator)
        torch.testing.assert_close(draw_poses(poses, (32, 32)), expected)
    all_at_once = read_poses([keypoints, pose_map[None], drawing], [(96, 64)])
    assert draw_poses(all_at_once, (32, 32)).shape == (3, 21, 32, 32)
    assert len(read_poses(np.stack([keypoints, keypoints]), [(96, 64), (9600, 6400)])) == 2


def test_a_drawing_has_its_own_size_as_frame():
    keypoints = np.floor(FIGURE.keypoints)
    (pose,) = read_poses(draw_skeleton(keypoints, (96, 64), (192, 128)), [(1, 1)])
    assert pose.frame == (192, 128)
    found = np.isfinite(pose.keypoints[:, 0])
    assert np.abs(pose.keypoints[found, :2] - 2 * keypoints[found, :2]).max() <= 1


def test_only_keypoints_need_a_frame():
    keypoints = np.floor(FIGURE.keypoints)
    drawing = draw_skeleton(keypoints, (96, 64), (192, 128))
    sizes = [(96, 64), (48, 32), (10, 10)]
    for pose in (drawing, torch.zeros(21, 32, 32), FramedPose(keypoints, (96, 64))):
        assert len(read_poses(pose, sizes)) == 1
    with pytest.raises(
        ValueError, match=r"keypoints need one frame.*\(10, 10\)\]; give pose_frame"
    ):
        read_poses([drawing, keypoints], sizes)


def test_joints_without_score_are_missing():
    keypoints = FIGURE.keypoints.copy()
    keypoints[3] = (5, 5, 0)
    (pose,) = read_poses(keypoints, [(96, 64)])
    assert np.isnan(pose.keypoints[3, :2]).all()
    assert np.isfinite(keypoints[3]).all()


def test_poses_that_do_not_fit_are_refused():
    nobody = np.full((18, 3), np.nan, dtype=np.float32)
    photo = FIGURE.image
    with pytest.raises(ValueError, match="no joint of the pose"):
        read_poses(nobody, [(96, 64)])
    with pytest.raises(ValueError, match=r"do not lie in a frame of height, width .* pose_frame"):
        read_poses(FIGURE.keypoints, [(30, 30)])
    for estimator in (None, "openpose"):
        with pytest.raises(ValueError, match="for a photo give a pose_estimator, whose method"):
            find_person(photo, estimator)
    for values in (torch.full((21, 8, 8), 255.0), torch.full((21, 8, 8), float("nan"))):
        with pytest.raises(ValueError, match=r"a pose map has values from .*, not in \[0, 1\]"):
            read_poses(values, [(96, 64)])
    with pytest.raises(ValueError, match=r"a pose is keypoints .* not str"):
        read_poses("b.jpg", [(96, 64)])
    with pytest.raises(ValueError, match=r"pose map of \(8, 8\) is given, the model's are"):
        draw_poses(read_poses(torch.zeros(21, 8, 8), [(96, 64)]), (32, 32))
    with pytest.raises(NoPersonError, match="no person was found"):
        find_person(photo, FixedEstimator(nobody))


@pytest.mark.parametrize(
    ("check", "message"),
    [
        (lambda: check_noise(3, None, (1, 4)), "generator is 3; give a torch.Generator, or a"),
        (lambda: check_noise((Generator(),), None, (1, 4)), "generator is .*, or a list of them"),
        (lambda: check_noise([Generator()], None, (2, 4)), "1 generators for 2 results"),
        (lambda: check_noise(None, np.zeros((1, 4)), (1, 4)), r"latents are ndarray, expected"),
    ],
)
def test_noise_of_another_type_or_number_is_refused(check, message):
    with pytest.raises(ValueError, match=message):
        check()


@pytest.mark.parametrize("frame", [(1080, 1920), (1920, 1080), (700, 700)])
def test_fitted_frames_have_the_wanted_shape_and_the_same_person(frame):
    keypoints = np.full((18, 3), (np.nan, np.nan, 0), dtype=np.float32)
    keypoints[:4] = [[300, 100, 1], [340, 150, 1], [260, 150, 1], [300, 600, 1]]
    fitted = fit_frame(FramedPose(keypoints, frame), (256, 176))
    assert fitted.frame[1] / fitted.frame[0] == pytest.approx(176 / 256, rel=0.01)
    moved = fitted.keypoints[:4, :2] - keypoints[:4, :2]
    np.testing.assert_allclose(moved, np.broadcast_to(moved[0], moved.shape), atol=1e-3)
    assert (fitted.keypoints[:4, :2] >= 0).all()
    assert (fitted.keypoints[:4, :2] <= np.array(fitted.frame[::-1])).all()


def test_a_frame_of_about_the_wanted_shape_is_kept():
    pose = FramedPose(FIGURE.keypoints, (256, 176))
    assert fit_frame(pose, (1101, 750)) is pose


def test_a_person_wider_than_the_shape_widens_the_frame():
    keypoints = np.full((18, 3), (np.nan, np.nan, 0), dtype=np.float32)
    keypoints[:2] = [[100, 300, 1], [900, 320, 1]]  # lying
    fitted = fit_frame(FramedPose(keypoints, (600, 1000)), (256, 176))
    assert fitted.frame[1] >= 900
    assert fitted.frame[1] / fitted.frame[0] == pytest.approx(176 / 256, rel=0.01)
    assert (fitted.keypoints[:2, :2] >= 0).all()
