"""The batched decoder: against controlnet-aux's own, and where that one is of no use."""

import importlib.util
from pathlib import Path

import cv2
import numpy as np
import onnxruntime
import pytest
import torch

from cfld.pose_decoder import LIMBS, DecoderConfig, decode_people

CELLS = (46, 40)
STRIDE = 8
CONFIG = DecoderConfig()
# A person standing upright, in units of its height.
UPRIGHT = np.array([
    (0, .1), (0, .2), (-.1, .2), (-.15, .35), (-.17, .5), (.1, .2), (.15, .36), (.18, .5),
    (-.06, .5), (-.08, .72), (-.08, .95), (.06, .5), (.07, .73), (.09, .96),
    (-.03, .08), (.03, .07), (-.06, .1), (.06, .09),
])  # fmt: skip


@pytest.fixture(scope="module")
def controlnet_aux_decoder():
    path = Path(__file__).parents[1] / "benchmarks" / "controlnet_aux_decoder.py"
    spec = importlib.util.spec_from_file_location("controlnet_aux_decoder", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.ControlnetAuxDecoder()


def make_person(x: float, y: float, height: float, seed: int = 0) -> np.ndarray:
    """Joints in pixels, never midway between two: there controlnet-aux finds a peak twice."""
    jitter = np.random.default_rng(seed).uniform(-0.01, 0.01, UPRIGHT.shape)
    return np.array((x, y)) + height * (UPRIGHT + jitter) + 0.0137


def draw_maps(people: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Ideal outputs of a network: Gaussians at joints, unit vectors on limbs; no NaN joints."""
    rows, columns = (STRIDE * np.arange(n) + (STRIDE - 1) / 2 for n in CELLS)
    heatmaps = np.zeros((19, *CELLS), dtype=np.float32)
    affinities = np.zeros((38, *CELLS), dtype=np.float32)
    cells = np.stack(np.meshgrid(columns, rows), axis=-1)
    for person in people:
        for joint, point in enumerate(person):
            squared = ((cells - point) ** 2).sum(axis=-1)
            heatmaps[joint] = np.fmax(heatmaps[joint], np.exp(-squared / (2 * 8**2)))
        for start, end, channel in LIMBS:
            span = person[end] - person[start]
            along = ((cells - person[start]) @ span) / (span @ span)
            nearest = person[start] + np.clip(along, 0, 1)[..., None] * span
            is_near = np.linalg.norm(cells - nearest, axis=-1) < 12
            affinities[channel, is_near], affinities[channel + 1, is_near] = span / np.linalg.norm(
                span
            )
    heatmaps[18] = 1 - heatmaps.max(axis=0)
    return heatmaps, affinities


def decode(
    *maps: tuple[np.ndarray, np.ndarray], config: DecoderConfig = CONFIG
) -> list[np.ndarray]:
    heatmaps, affinities = (torch.from_numpy(np.stack(part)) for part in zip(*maps, strict=True))
    return decode_people(heatmaps, affinities, config)


def assert_same_people(ours: np.ndarray, theirs: np.ndarray) -> None:
    """The same joints, ours refined within the pixel that theirs is."""
    np.testing.assert_array_equal(np.isnan(ours), np.isnan(theirs))
    distance = np.abs(ours - theirs)[..., :2]
    assert np.nanmax(distance, initial=0) <= 0.5 + 1e-5
    np.testing.assert_allclose(ours[..., 2], theirs[..., 2], atol=1e-5)


CROWDS = {
    "nobody": [],
    "one": [make_person(160, 20, 300)],
    "small": [make_person(100, 100, 120)],
    "two apart": [make_person(80, 40, 250), make_person(230, 60, 240, 1)],
    "two overlapping": [make_person(140, 30, 300), make_person(175, 45, 290, 1)],
    "three crossing": [make_person(x, 40, 260, x) for x in (120, 150, 190)],
    "at the border": [make_person(12, -20, 330), make_person(310, 80, 330, 1)],
}


@pytest.mark.parametrize("name", CROWDS)
def test_same_people_as_controlnet_aux_on_drawn_maps(controlnet_aux_decoder, name):
    maps = draw_maps(CROWDS[name])
    assert_same_people(decode(maps)[0], controlnet_aux_decoder(*maps))


@pytest.mark.parametrize("seed", range(4))
def test_same_people_as_controlnet_aux_on_noisy_crowds(controlnet_aux_decoder, seed):
    generator = np.random.default_rng(seed)
    people = [
        make_person(*generator.uniform((40, 0, 120), (280, 120, 320)), seed=i) for i in range(5)
    ]
    maps = [
        part + generator.normal(0, 0.05, part.shape).astype(np.float32)
        for part in draw_maps(people)
    ]
    theirs = controlnet_aux_decoder(*maps)
    assert len(theirs) > 1
    assert_same_people(decode(tuple(maps))[0], theirs)


def test_same_people_as_controlnet_aux_on_photos(controlnet_aux_decoder, shared_dir):
    session = onnxruntime.InferenceSession(
        shared_dir / "models" / "openpose_mobilenet_v2_small.onnx"
    )
    outputs = []
    for path in sorted((shared_dir / "data" / "people").glob("*.jpg"))[::9]:
        photo = cv2.resize(cv2.imread(str(path)), (224, 368), interpolation=cv2.INTER_AREA)
        canvas = cv2.copyMakeBorder(photo, 40, 40, 40, 40, cv2.BORDER_CONSTANT, value=(128,) * 3)
        pixels = canvas.transpose(2, 0, 1)[None].astype(np.float32)
        outputs.append(session.run(None, {"image": pixels})[0][0])
    maps = [(output[:19], output[19:]) for output in outputs]
    num_people = 0
    for ours, of_photo in zip(decode(*maps), maps, strict=True):
        assert_same_people(ours, controlnet_aux_decoder(*of_photo))
        num_people += len(ours)
    assert num_people >= len(maps)


def test_joints_are_where_they_were_drawn():
    person = make_person(160, 20, 300)
    (people,) = decode(draw_maps([person]))
    assert people.shape == (1, 18, 3)
    np.testing.assert_allclose(people[0, :, :2], person, atol=0.5)
    assert (people[0, :, 2] > 0.7).all()


def test_missing_joints_are_nan():
    person = make_person(160, 20, 300)
    person[[4, 10]] = np.nan
    ((found,),) = decode(draw_maps([person]))
    np.testing.assert_array_equal(np.isnan(found[:, 0]).nonzero()[0], [4, 10])
    np.testing.assert_array_equal(found[[4, 10], 2], 0)


def test_single_joint_is_nobody():
    person = np.full((18, 2), np.nan)
    person[3] = (150, 150)
    assert decode(draw_maps([person]))[0].shape == (0, 18, 3)


def test_fewer_joints_than_required_are_nobody():
    person = make_person(160, 20, 300)
    person[3:] = np.nan  # nose, neck and a shoulder remain
    maps = draw_maps([person])
    assert len(decode(maps)[0]) == 0
    assert len(decode(maps, config=DecoderConfig(min_joints=3))[0]) == 1


def test_a_batch_equals_its_images_alone():
    maps = [draw_maps(crowd) for crowd in CROWDS.values()]
    for together, alone in zip(decode(*maps), (decode(each)[0] for each in maps), strict=True):
        np.testing.assert_allclose(together, alone, rtol=1e-5)


def test_half_precision_outputs_are_accepted():
    heatmaps, affinities = (torch.from_numpy(m[None]).half() for m in draw_maps(CROWDS["one"]))
    (people,) = decode_people(heatmaps, affinities, CONFIG)
    assert len(people) == 1


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite_are_refused(value):
    good, bad = draw_maps(CROWDS["one"]), draw_maps(CROWDS["one"])
    bad[1][5, 3, 3] = value
    with pytest.raises(ValueError, match=r"images \[1\] of the batch .* not finite"):
        decode(good, bad)


@pytest.mark.gpu
def test_gpu_equals_cpu():
    maps = [draw_maps(crowd) for crowd in CROWDS.values()]
    heatmaps, affinities = (
        torch.from_numpy(np.stack(part)).cuda() for part in zip(*maps, strict=True)
    )
    for gpu, cpu in zip(decode_people(heatmaps, affinities, CONFIG), decode(*maps), strict=True):
        np.testing.assert_allclose(gpu, cpu, atol=1e-3)
