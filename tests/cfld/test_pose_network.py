"""Pose networks and the estimator around them: coordinates, colours, batches, who is the person."""

import importlib.util
import logging
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from cfld.images import decode_image
from cfld.openpose import OnnxInput, OpenPoseNetwork, PoseNetworkError
from cfld.pose_decoder import DecoderConfig
from cfld.pose_network import PoseEstimator, PoseEstimatorConfig

NECK, RIGHT_SHOULDER, LEFT_SHOULDER = 1, 2, 5
COLOUR_OF_JOINT = {NECK: 0, RIGHT_SHOULDER: 1, LEFT_SHOULDER: 2}  # channel of an RGB image


def field(number: int, value: int | bytes) -> bytes:
    """One field of a protocol buffer: a number, or bytes with their length."""
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def varint(value: int) -> bytes:
    head, rest = value & 127, value >> 7
    return bytes([head | 128]) + varint(rest) if rest else bytes([head])


def write_onnx(path: Path, *outputs: tuple[np.ndarray, np.ndarray], stride: int = 8) -> Path:
    """An ONNX file with one convolution (weight, bias) of the image per output, without padding.

    The messages are encoded by hand (numbers from onnx.proto3), because the onnx package is no
    dependency of ours.
    """
    graph = b""
    for index, arrays in enumerate(outputs):
        names = [b"image", b"weight%d" % index, b"bias%d" % index]
        strides = field(1, b"strides") + field(8, stride) * 2 + field(20, 7)
        node = b"".join(field(1, name) for name in names) + field(2, b"output%d" % index)
        graph += field(1, node + field(4, b"Conv") + field(5, strides))
        for name, array in zip(names[1:], arrays, strict=True):
            dims = b"".join(field(1, size) for size in array.shape)
            data = field(9, array.astype("<f4").tobytes())
            graph += field(5, dims + field(2, 1) + field(8, name) + data)
        graph += field(12, value_info(b"output%d" % index))
    graph += field(2, b"graph") + field(11, value_info(b"image"))
    path.write_bytes(field(1, 8) + field(7, graph) + field(8, field(1, b"") + field(2, 17)))
    return path


def value_info(name: bytes) -> bytes:
    dims = b"".join(field(1, field(2, name + b"%d" % axis)) for axis in range(4))
    return field(1, name) + field(2, field(1, field(1, 1) + field(2, dims)))


def colour_network() -> tuple[np.ndarray, np.ndarray]:
    """Convolution whose heatmaps are the colours above grey: neck red, shoulders green and blue.

    It takes BGR in 0..255. The affinity fields are constant: the shoulders lie left and right.
    """
    weight, bias = np.zeros((57, 3, 8, 8)), np.zeros(57)
    for joint, channel in COLOUR_OF_JOINT.items():
        weight[joint, 2 - channel] = 1 / (127 * 64)
        bias[joint] = -128 / 127
    bias[19 + 12], bias[19 + 20] = -1, 1
    return weight, bias


def paint(size: tuple[int, int], *people: dict[int, tuple[float, float]]) -> np.ndarray:
    """A grey photo with a soft blob per joint (x, y), wide enough for the network to place it."""
    y, x = np.mgrid[: size[0], : size[1]]
    image = np.full((*size, 3), 128.0)
    sigma = 12 * size[0] / 368
    for person in people:
        for joint, (joint_x, joint_y) in person.items():
            squared = (x - joint_x) ** 2 + (y - joint_y) ** 2
            image[..., COLOUR_OF_JOINT[joint]] += 127 * np.exp(-squared / (2 * sigma**2))
    return np.rint(image.clip(0, 255)).astype(np.uint8)


def person_at(x: float, y: float, reach: float) -> dict[int, tuple[float, float]]:
    return {NECK: (x, y), RIGHT_SHOULDER: (x - reach, y + 3), LEFT_SHOULDER: (x + reach, y + 2)}


@pytest.fixture(scope="module")
def onnx_file(tmp_path_factory):
    return write_onnx(tmp_path_factory.mktemp("network") / "colour.onnx", colour_network())


@pytest.fixture(scope="module")
def config(onnx_file):
    decoder = DecoderConfig(min_joints=3)
    return PoseEstimatorConfig(network=str(onnx_file), decoder=decoder, num_threads=1, batch_size=2)


@pytest.fixture(scope="module")
def estimator(config):
    return PoseEstimator(config)


@pytest.mark.parametrize("size", [(200, 130), (368, 272), (801, 750), (128, 64), (100, 400)])
def test_joints_come_back_in_pixels_of_the_photo(estimator, size):
    joints = person_at(0.47 * size[1], 0.4 * size[0], 0.21 * size[1])
    (pose,) = estimator.estimate([paint(size, joints)])
    assert pose.num_people == 1
    input_px = size[0] / 368 if size[1] < 656 / 368 * size[0] else size[1] / 656
    for joint, point in joints.items():
        # Half a pixel of either frame forgotten anywhere would be 0.5 or more.
        assert np.abs(pose.keypoints[joint, :2] - point).max() < 0.25 * max(1, input_px)
    others = np.delete(pose.keypoints, list(joints), axis=0)
    np.testing.assert_array_equal(others, np.tile((np.nan, np.nan, 0), (15, 1)))


def test_mixed_sizes_in_one_call_equal_single_calls(estimator):
    sizes = [(200, 130), (300, 200), (200, 130), (128, 64), (200, 130)]
    images = [paint(size, person_at(0.5 * size[1], 60 + i, 20)) for i, size in enumerate(sizes)]
    for together, image in zip(estimator.estimate(images), images, strict=True):
        (alone,) = estimator.estimate([image])
        np.testing.assert_allclose(together.keypoints, alone.keypoints, rtol=1e-5)


def test_no_images_give_no_poses(estimator):
    assert estimator.estimate([]) == []


def test_nobody_is_an_outcome_of_its_own(estimator):
    nobody, somebody = estimator.estimate(
        [paint((200, 130)), paint((200, 130), person_at(60, 90, 30))]
    )
    assert nobody.num_people == 0
    np.testing.assert_array_equal(nobody.keypoints, np.tile((np.nan, np.nan, 0), (18, 1)))
    assert somebody.num_people == 1


def test_main_person_is_the_large_central_one(estimator):
    large, small = person_at(150, 80, 60), person_at(40, 160, 25)
    (pose,) = estimator.estimate([paint((200, 300), small, large)])
    assert pose.num_people == 2
    np.testing.assert_allclose(pose.keypoints[NECK, :2], large[NECK], atol=1)


def test_joints_are_never_outside_of_the_photo(estimator):
    (pose,) = estimator.estimate([paint((200, 130), person_at(64, 90, 64))])
    found = pose.keypoints[np.isfinite(pose.keypoints[:, 0])]
    assert len(found) == 3
    assert found[:, 0].min() >= 0
    assert found[:, 0].max() <= 129


def test_outputs_may_be_two(tmp_path, config, estimator):
    weight, bias = colour_network()
    halves = ((weight[19:], bias[19:]), (weight[:19], bias[:19]))
    path = write_onnx(tmp_path / "two.onnx", *halves)
    image = paint((200, 130), person_at(60, 90, 30))
    two = PoseEstimator(PoseEstimatorConfig(network=str(path), decoder=config.decoder))
    np.testing.assert_array_equal(
        two.estimate([image])[0].keypoints, estimator.estimate([image])[0].keypoints
    )


def test_colour_order_and_range_are_settings(tmp_path, config, estimator):
    weight, bias = colour_network()
    # The same network for RGB in -1..1: x = 127.5 u + 127.5.
    bias = bias + 127.5 * weight.sum(axis=(1, 2, 3))
    path = write_onnx(tmp_path / "rgb.onnx", (127.5 * weight[:, ::-1], bias))
    as_rgb = PoseEstimatorConfig(
        network=str(path),
        decoder=config.decoder,
        onnx_input=OnnxInput(colour_order="rgb", scale=1 / 127.5, offset=-1.0),
    )
    image = paint((200, 130), person_at(60, 90, 30))
    np.testing.assert_allclose(
        PoseEstimator(as_rgb).estimate([image])[0].keypoints,
        estimator.estimate([image])[0].keypoints,
        atol=1e-3,
    )


def test_survives_pickling(estimator):
    copy = pickle.loads(pickle.dumps(estimator))
    assert copy.config == estimator.config
    image = paint((200, 130), person_at(60, 90, 30))
    np.testing.assert_array_equal(
        copy.estimate([image])[0].keypoints, estimator.estimate([image])[0].keypoints
    )


def test_says_where_it_runs(config, caplog):
    with caplog.at_level(logging.INFO, logger="cfld.pose_network"):
        PoseEstimator(config)
    assert "colour.onnx on cpu, onnxruntime" in caplog.text


@pytest.mark.parametrize(
    "image",
    [np.zeros((10, 10), np.uint8), np.zeros((9, 9, 4), np.uint8), np.zeros((0, 9, 3), np.uint8)],
)
def test_other_than_rgb_is_refused(estimator, image):
    with pytest.raises(ValueError, match=r"must be uint8 \(height, width, 3\)"):
        estimator.estimate([image])


class TestUnusableNetworks:
    def load(self, network: Path | str, **settings) -> PoseEstimator:
        return PoseEstimator(PoseEstimatorConfig(network=str(network), **settings))

    def test_no_such_file(self, tmp_path):
        for name in ("a.onnx", "a.pth"):
            with pytest.raises(
                PoseNetworkError, match=rf"{name}: no such file; give .*--pose-network"
            ):
                self.load(tmp_path / name)

    def test_no_onnx(self, tmp_path):
        (tmp_path / "a.onnx").write_bytes(b"hello")
        with pytest.raises(PoseNetworkError, match=r"a\.onnx: .*give OpenPose's"):
            self.load(tmp_path / "a.onnx")

    def test_other_outputs(self, tmp_path):
        path = write_onnx(tmp_path / "a.onnx", (np.zeros((5, 3, 8, 8)), np.zeros(5)))
        with pytest.raises(
            PoseNetworkError, match=r"outputs have \[5\] channels, OpenPose's have 57"
        ):
            self.load(path)

    def test_other_stride(self, tmp_path):
        path = write_onnx(tmp_path / "a.onnx", (np.zeros((57, 3, 4, 4)), np.zeros(57)), stride=4)
        with pytest.raises(
            PoseNetworkError, match="has one cell per 4 pixels, the decoder expects 8"
        ):
            self.load(path)
        self.load(path, decoder=DecoderConfig(stride=4))

    def test_no_hub(self, monkeypatch, tmp_path):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
        with pytest.raises(PoseNetworkError, match=r"cannot be had from the hub .*--pose-network"):
            self.load("lllyasviel/Annotators")

    @pytest.mark.parametrize("content", [{"conv1_1.weight": torch.zeros(1)}, [1, 2], {}])
    def test_other_weights(self, tmp_path, content):
        torch.save(content, tmp_path / "a.pth")
        with pytest.raises(
            PoseNetworkError, match=r"a\.pth: no weights of OpenPose's body network"
        ):
            self.load(tmp_path / "a.pth")

    @pytest.mark.filterwarnings("ignore:Detected pickle protocol")
    def test_hostile_pickle_is_not_run(self, tmp_path):
        (tmp_path / "a.pth").write_bytes(pickle.dumps(Touch(tmp_path / "touched")))
        with pytest.raises(PoseNetworkError, match=r"no weights of OpenPose's body network"):
            self.load(tmp_path / "a.pth")
        assert not (tmp_path / "touched").exists()

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"batch_size": 0}, "batch_size is 0, must be at least 1"),
            ({"image_height_px": 0}, "image_height_px is 0, must be at least 1"),
            ({"border": -0.1}, "border is -0.1, must not be negative"),
        ],
    )
    def test_settings(self, settings, message):
        with pytest.raises(ValueError, match=re.escape(message)):
            PoseEstimatorConfig(**settings)


class Touch:
    """Creates a file when unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.fixture(scope="module")
def open_pose():
    """controlnet-aux's package for OpenPose."""
    path = Path(__file__).parents[1] / "benchmarks" / "controlnet_aux_decoder.py"
    spec = importlib.util.spec_from_file_location("controlnet_aux_decoder", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.load_open_pose()


@pytest.fixture(scope="module")
def weights_file(open_pose, tmp_path_factory):
    """Random weights of controlnet-aux's body network under the published names."""
    torch.manual_seed(0)
    state = open_pose.model.bodypose_model().state_dict()
    path = tmp_path_factory.mktemp("weights") / "body_pose_model.pth"
    torch.save({name.partition(".")[2]: value for name, value in state.items()}, path)
    return path


def test_open_pose_equals_controlnet_aux(open_pose, weights_file):
    image = np.random.default_rng(0).integers(0, 256, (64, 48, 3), dtype=np.uint8)
    # controlnet-aux is given BGR and maps it to -0.5..0.5.
    pixels = torch.from_numpy(image[None, :, :, ::-1].transpose(0, 3, 1, 2) / 256 - 0.5).float()
    with torch.no_grad():
        expected = open_pose.body.Body(str(weights_file)).model(pixels)
    heatmaps, affinities = OpenPoseNetwork(str(weights_file), "cpu")(np.stack([image, image]))
    for ours, theirs in zip((affinities, heatmaps), expected, strict=True):
        torch.testing.assert_close(ours[1:], theirs, rtol=1e-4, atol=1e-5)


def test_open_pose_estimates(weights_file):
    config = PoseEstimatorConfig(network=str(weights_file), device="cpu", image_height_px=48)
    images = [np.full((60, 40, 3), 99, np.uint8), np.full((60, 50, 3), 9, np.uint8)]
    assert [pose.num_people for pose in PoseEstimator(config).estimate(images)] == [0, 0]


def test_finds_real_people(shared_dir):
    network = str(shared_dir / "models" / "openpose_mobilenet_v2_small.onnx")
    estimator = PoseEstimator(PoseEstimatorConfig(network=network, num_threads=1))
    photo = decode_image((shared_dir / "data" / "people" / "astronaut_0.jpg").read_bytes())
    (pose,) = estimator.estimate([photo])
    # Annotated: nose, neck, left shoulder, right and left eye.
    expected = np.array([(208, 126), (194, 238), (292, 245), (189, 102), (235, 111)])
    distance = np.linalg.norm(pose.keypoints[[0, 1, 5, 14, 15], :2] - expected, axis=1)
    assert pose.num_people == 1
    assert distance.max() < 0.1 * photo.shape[0]
