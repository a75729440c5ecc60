import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from cfld.edit import main
from cfld.generate import main as generate
from preprocessing.figures import draw_figure
from tests.keypoint_files import write_openpose_json, write_patn_csv

SIZE = (96, 64)
ANNA, BEA, CARA = (draw_figure(person, 0, size=SIZE, seed=0) for person in range(3))
POSES = [draw_figure(3, image, size=SIZE, seed=0).keypoints for image in range(3)]
FAST = ["--steps", "2", "--device", "cpu"]


@pytest.fixture
def folder(tmp_path):
    for name, figure in (("anna", ANNA), ("bea", BEA), ("cara", CARA)):
        Image.fromarray(figure.image).save(tmp_path / f"{name}.png")
        write_openpose_json(tmp_path / f"{name}.json", figure.keypoints[None])
    for number, keypoints in enumerate(POSES):
        write_openpose_json(tmp_path / f"{number}.json", keypoints[None])
    write_patn_csv(
        tmp_path / "poses.csv", [(f"{number}.jpg", pose) for number, pose in enumerate(POSES)]
    )
    return tmp_path


def arguments(weights, folder, command, **options):
    words = [command, "--weights", weights, *FAST]
    for name, values in options.items():
        values = values if isinstance(values, (list, tuple)) else [values]
        words += [f"--{name.replace('_', '-')}", *map(str, values)]
    return words


def run(weights, folder, command, **options):
    return main(arguments(weights, folder, command, **options))


def transfer(weights, folder, **options):
    given = {"image": folder / "bea.png", "reference": folder / "anna.png"}
    given |= {"pose": folder / "anna.json", "output": folder / "out.png"}
    return run(weights, folder, "transfer", **(given | options))


def mix(weights, folder, **options):
    given = {"image": [folder / "anna.png", folder / "bea.png"], "pose": folder / "0.json"}
    return run(weights, folder, "interpolate", **(given | {"output": folder / "out.png"} | options))


def walk(weights, folder, **options):
    given = {"image": folder / "anna.png", "poses": [folder / f"{n}.json" for n in range(3)]}
    return run(weights, folder, "walk", **(given | {"output": folder / "out.png"} | options))


def single(weights, folder, photo, pose):
    """What the command for single pictures gives."""
    words = ["--weights", weights, *FAST, "--image", folder / photo, "--pose", folder / pose]
    assert generate([str(word) for word in (*words, "--output", folder / "single.png")]) == 0
    return pixels(folder / "single.png")


def pixels(path):
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def panels(path):
    strip = pixels(path)
    return [strip[:, left : left + SIZE[1]] for left in range(0, strip.shape[1], SIZE[1])]


def save_mask(path, mask):
    Image.fromarray(np.asarray(mask, np.uint8) * 255).save(path)
    return path


# transfer


def test_only_the_masked_part_changes(weights, folder):
    mask = np.zeros(SIZE, bool)
    mask[48:] = True
    assert transfer(weights, folder, mask=save_mask(folder / "mask.png", mask)) == 0
    edited = pixels(folder / "out.png")
    # The reference as the model's square of 32 x 32 pixels can show it.
    small = Image.fromarray(ANNA.image).resize((32, 32), Image.Resampling.BICUBIC)
    expected = np.asarray(small.resize((64, 96), Image.Resampling.BICUBIC)).astype(int)
    assert np.abs(edited - expected)[:42].mean() < 2
    assert np.abs(edited - expected)[54:].mean() > 10


def test_a_white_mask_is_plain_generation(weights, folder, caplog):
    mask = save_mask(folder / "mask.png", np.ones(SIZE, bool))
    assert transfer(weights, folder, mask=mask) == 0
    assert "the mask is wholly white" in caplog.text
    np.testing.assert_array_equal(
        pixels(folder / "out.png"), single(weights, folder, "bea.png", "anna.json")
    )


def test_without_a_mask_one_is_drawn_around_the_pose(weights, folder):
    drawn = folder / "drawn.png"
    assert transfer(weights, folder, region=["legs", "arms"], save_mask=drawn) == 0
    edited = pixels(folder / "out.png")
    assert 0.02 < pixels(drawn).mean() / 255 < 0.5
    assert transfer(weights, folder, mask=drawn) == 0
    np.testing.assert_array_equal(edited, pixels(folder / "out.png"))
    assert transfer(weights, folder) == 0
    assert np.abs(edited - pixels(folder / "out.png")).max() > 0  # the torso


def test_the_references_pose_is_found_in_the_photo(weights, folder, shared_dir):
    photo = shared_dir / "data" / "people" / "astronaut_0.jpg"
    words = arguments(
        weights,
        folder,
        "transfer",
        image=folder / "anna.png",
        reference=photo,
        region="head",
        output=folder / "out.png",
        pose_network=shared_dir / "models" / "openpose_mobilenet_v2_small.onnx",
    )
    assert main(words) == 0
    assert Image.open(folder / "out.png").size == Image.open(photo).size


def test_unfit_masks_are_found_before_work_starts(weights, folder, caplog):
    dot = np.zeros(SIZE, bool)
    dot[5, 5] = True
    Image.fromarray(ANNA.image // 2 + 60).save(folder / "photo.png")
    for mask, message in (
        (save_mask(folder / "size.png", np.ones((48, 64))), "the mask has 48 x 64 pixels"),
        (save_mask(folder / "empty.png", np.zeros(SIZE)), "empty.png: the mask is empty"),
        (save_mask(folder / "dot.png", dot), "dot.png: too small a part of"),
        (folder / "photo.png", "photo.png: is no mask; it must be black, and white"),
        (folder / "none.png", "none.png: no such file"),
    ):
        caplog.clear()
        assert transfer(weights, folder, mask=mask) == 2
        assert message in caplog.text
    face = np.full((18, 3), (np.nan, np.nan, 0), np.float32)
    face[:2] = [(30, 20, 1), (30, 40, 1)]
    write_openpose_json(folder / "face.json", face[None])
    assert transfer(weights, folder, pose=folder / "face.json", region="legs") == 2
    assert "face.json: the pose has too few joints for the legs; give a mask" in caplog.text
    assert transfer(weights, folder, save_mask=folder / "mask.doc") == 2
    assert "mask.doc: ends in no image format" in caplog.text
    assert not (folder / "out.png").exists()


# interpolate


def test_the_ends_of_a_mixture_are_the_two_persons(weights, folder):
    assert mix(weights, folder, frames=4, method="spherical") == 0
    frames = panels(folder / "out.png")
    assert len(frames) == 4
    np.testing.assert_array_equal(frames[0], single(weights, folder, "anna.png", "0.json"))
    np.testing.assert_array_equal(frames[-1], single(weights, folder, "bea.png", "0.json"))
    from_first = [np.abs(frame - frames[0]).mean() for frame in frames]
    assert from_first == sorted(from_first)


def test_batches_of_frames_give_the_same_picture(weights, folder):
    assert mix(weights, folder, frames=3) == 0
    alone = pixels(folder / "out.png")
    assert mix(weights, folder, frames=3, batch_size=2) == 0
    assert np.abs(alone - pixels(folder / "out.png")).max() <= 1


def test_prompt_and_biases_are_mixed_alone(weights, folder):
    ends = {}
    for parts in (["prompt"], ["biases"], ["prompt", "biases"]):
        assert mix(weights, folder, frames=2, mix=parts) == 0
        first, ends[len(ends)] = panels(folder / "out.png")
    assert np.abs(ends[0] - first).max() > 0
    assert np.abs(ends[1] - first).max() > 0
    assert np.abs(ends[0] - ends[1]).max() > 0
    assert np.abs(ends[0] - ends[2]).max() > 0


# walk


def test_a_walk_shows_each_pose(weights, folder):
    assert walk(weights, folder) == 0
    frames = panels(folder / "out.png")
    assert len(frames) == 3
    for number in (0, 2):
        own = single(weights, folder, "anna.png", f"{number}.json")
        np.testing.assert_array_equal(frames[number], own)


def test_a_keypoint_file_gives_all_of_its_poses(weights, folder):
    assert walk(weights, folder, poses=[folder / "poses.csv"]) == 0
    whole = pixels(folder / "out.png")
    rows = [f"{folder / 'poses.csv'}:{number}.jpg" for number in range(3)]
    assert walk(weights, folder, poses=rows) == 0
    np.testing.assert_array_equal(whole, pixels(folder / "out.png"))


@pytest.mark.parametrize("suffix", [".gif", ".webp"])
def test_an_animation_holds_all_frames(weights, folder, suffix):
    output = folder / f"out{suffix}"
    poses = [folder / "0.json", folder / "1.json"]
    assert walk(weights, folder, poses=poses, between=1, frame_ms=80, output=output) == 0
    with Image.open(output) as animation:
        assert animation.n_frames == 3
        assert animation.size == SIZE[::-1]
        assert animation.info["loop"] == 0
        animation.load()
        assert animation.info["duration"] == 80
    assert not list(folder.glob(".*"))


def test_unfit_walks_are_found_before_work_starts(weights, folder, caplog):
    lonely = [np.full((18, 3), (np.nan, np.nan, 0), np.float32) for _ in range(2)]
    for joint, pose in enumerate(lonely):
        pose[joint] = (30, 40, 1)
        write_openpose_json(folder / f"lonely{joint}.json", pose[None])
    (folder / "bad.csv").write_text("name:keypoints_y:keypoints_x\na.jpg: [1]: [2]\n")
    (folder / "none.csv").write_text("name:keypoints_y:keypoints_x\n")
    (folder / "nobody.json").write_text('{"people": []}')
    (folder / "no.json").write_text("{}")
    for options, message in (
        (
            {"poses": [folder / "lonely0.json", folder / "lonely1.json"], "between": 1},
            "--between 1: two poses have no joint in common",
        ),
        ({"poses": [folder / "bad.csv"]}, "bad.csv: row 2: 1 values, expected 18"),
        ({"poses": [folder / "none.csv"]}, "none.csv: lists no image"),
        ({"poses": [folder / "nobody.json"]}, "nobody.json: lists nobody with any joint"),
        ({"poses": [folder / "no.json"]}, "no.json: has no key 'people'"),
        ({"poses": [folder / "0.json"], "pose_frame": [9, 9]}, "0.json: joints at x, y from"),
        ({"poses": [folder / "9.json"]}, "9.json: no such file"),
        ({"output": folder / "out.avi"}, "out.avi: ends in no image format"),
    ):
        caplog.clear()
        assert walk(weights, folder, **options) == 2
        assert message in caplog.text
    assert walk(str(folder), folder) == 2
    assert "no weights of this project" in caplog.text


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["dance"],
        ["transfer", "--weights", "w", "--image", "a.png"],
        ["walk", "--weights", "w", "--image", "a", "--poses", "b", "--output", "c", "--between=-1"],
    ],
)
def test_wrong_usage(words):
    with pytest.raises(SystemExit, match="2"):
        main(words)


@pytest.mark.slow
def test_the_command_as_a_process(weights, folder):
    command = [sys.executable, "-m", "cfld.edit"]
    given = {"image": folder / "anna.png", "poses": folder / "0.json", "output": folder / "a.png"}
    good = [*command, *arguments(weights, folder, "walk", **given)]
    done = subprocess.run(good, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "a.png is written: 1 frames" in done.stderr
    missing = subprocess.run([*good, "--poses", "no.json"], capture_output=True, text=True)
    assert missing.returncode == 2
    assert "Traceback" not in missing.stderr
