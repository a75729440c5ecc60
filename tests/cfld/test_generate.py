import csv
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from cfld.generate import main
from cfld.pose import draw_skeleton
from cfld.user_inputs import check_output, save_image
from preprocessing.figures import draw_figure
from tests.keypoint_files import write_openpose_json, write_patn_csv

FIRST, SECOND, THIRD = (draw_figure(0, image, size=(96, 64), seed=0) for image in range(3))
FAST = ["--steps", "2", "--device", "cpu"]


@pytest.fixture
def folder(tmp_path):
    """A photo a.png and one pose in every form."""
    for name, figure in (("a", FIRST), ("b", SECOND), ("c", THIRD)):
        Image.fromarray(figure.image).save(tmp_path / f"{name}.png")
    whole = np.floor(SECOND.keypoints)
    write_openpose_json(tmp_path / "b.json", whole[None])
    write_patn_csv(tmp_path / "poses.csv", [("x.jpg", FIRST.keypoints), ("b.jpg", whole)])
    Image.fromarray(draw_skeleton(whole, (96, 64), (96, 64))).save(tmp_path / "drawn.png")
    return tmp_path


def run(weights, folder, *arguments):
    return main(["--weights", weights, *FAST, *(str(argument) for argument in arguments)])


def one(folder, pose, output="out.png"):
    return "--image", folder / "a.png", "--pose", pose, "--output", folder / output


def pixels(path):
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def write_table(path, rows, columns=("image", "pose", "output")):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([columns, *rows])


def test_keypoint_files_give_the_same_picture(weights, folder):
    results = {}
    for pose in ("b.json", "poses.csv:b.jpg"):
        assert run(weights, folder, *one(folder, f"{folder}/{pose}")) == 0
        results[pose] = pixels(folder / "out.png")
        assert results[pose].shape == (96, 64, 3)
    np.testing.assert_array_equal(results["b.json"], results["poses.csv:b.jpg"])
    assert results["b.json"].std() > 5
    assert not list(folder.glob(".*"))


def test_a_drawing_is_a_pose(weights, folder):
    # Drawn twice as large, because at 96 x 64 the joints of the face cover each other.
    drawing = draw_skeleton(np.floor(SECOND.keypoints), (96, 64), (768, 512))
    Image.fromarray(drawing).save(folder / "drawn.png")
    assert run(weights, folder, *one(folder, folder / "drawn.png")) == 0
    drawn = pixels(folder / "out.png")
    assert run(weights, folder, *one(folder, folder / "b.json")) == 0
    assert np.abs(drawn - pixels(folder / "out.png")).mean() < 3


def test_a_photo_is_a_pose(weights, folder, shared_dir):
    network = shared_dir / "models" / "openpose_mobilenet_v2_small.onnx"
    photo = shared_dir / "data" / "people" / "astronaut_0.jpg"
    assert run(weights, folder, *one(folder, photo), "--pose-network", network) == 0
    assert pixels(folder / "out.png").shape == (96, 64, 3)


def test_a_photo_without_a_person_is_an_error(weights, folder, shared_dir, caplog):
    network = shared_dir / "models" / "openpose_mobilenet_v2_small.onnx"
    Image.new("RGB", (64, 96), "grey").save(folder / "empty.png")
    assert run(weights, folder, *one(folder, folder / "empty.png"), "--pose-network", network) == 2
    assert "empty.png: no person was found in the pose photo" in caplog.text


def test_size_seed_and_scheduler(weights, folder):
    options = one(folder, folder / "b.json")
    assert run(weights, folder, *options, "--size", 50, 30, "--scheduler", "ddim") == 0
    first = pixels(folder / "out.png")
    assert first.shape == (50, 30, 3)
    assert run(weights, folder, *options, "--size", 50, 30, "--scheduler", "ddim", "--seed", 1) == 0
    assert np.abs(first - pixels(folder / "out.png")).max() > 0


def test_a_table_gives_the_same_pictures_at_any_batch_size(weights, folder):
    photos = ("a.png", "b.png", "c.png")
    for name, batch_size in (("one", 1), ("two", 2)):
        rows = [
            (folder / photo, folder / "b.json", folder / name / f"{row}.png")
            for row, photo in enumerate(photos)
        ]
        write_table(folder / "jobs.csv", rows)
        table = ("--table", folder / "jobs.csv", "--batch-size", batch_size)
        assert run(weights, folder, *table) == 0
    for row in range(3):
        difference = pixels(folder / "one" / f"{row}.png") - pixels(folder / "two" / f"{row}.png")
        assert np.abs(difference).max() <= 1
    arguments = ("--image", folder / "c.png", "--pose", folder / "b.json", "--seed", 2)
    assert run(weights, folder, *arguments, "--output", folder / "out.png") == 0
    assert np.abs(pixels(folder / "out.png") - pixels(folder / "one" / "2.png")).max() <= 1


def test_a_table_goes_on_where_it_was_stopped(weights, folder):
    rows = [(folder / "a.png", folder / "b.json", folder / f"{row}.png") for row in range(3)]
    write_table(folder / "jobs.csv", rows)
    table = ("--table", folder / "jobs.csv")
    assert run(weights, folder, *table) == 0
    before = [(path.stat().st_mtime_ns, path.read_bytes()) for *_, path in rows]
    rows[1][2].unlink()
    assert run(weights, folder, *table) == 0
    after = [(path.stat().st_mtime_ns, path.read_bytes()) for *_, path in rows]
    assert after[0] == before[0]
    assert after[2] == before[2]
    assert np.abs(pixels(rows[1][2])).sum() > 0
    assert after[1][0] > before[1][0]


def test_bad_rows_are_reported_and_the_rest_goes_on(weights, folder, caplog):
    (folder / "broken.png").write_bytes(b"no image")
    good = (folder / "a.png", folder / "b.json", folder / "good.png")
    rows = [
        (folder / "none.png", folder / "b.json", folder / "1.png"),
        (folder / "broken.png", folder / "b.json", folder / "2.png"),
        (folder / "a.png", folder / "none.json", folder / "3.png"),
        (folder / "a.png", f"{folder}/poses.csv:y.jpg", folder / "4.png"),
        (folder / "a.png", "", folder / "5.png"),
        (folder / "a.png", folder / "b.json", folder / "6.doc"),
        good,
    ]
    write_table(folder / "jobs.csv", rows)
    assert run(weights, folder, "--table", folder / "jobs.csv") == 1
    assert good[2].is_file()
    with (folder / "jobs.failed.csv").open() as file:
        failed = list(csv.DictReader(file))
    expected = (
        "none.png: no such file",
        "cannot be read as an image",
        "none.json: no such file",
        "has no image 'y.jpg'",
        "a cell is empty",
        "ends in no image format",
    )
    assert len(failed) == len(expected)
    for row, reason in zip(failed, expected, strict=True):
        assert reason in row["reason"]
    assert "6 of 7 rows failed; they are listed in" in caplog.text
    write_table(folder / "jobs.csv", [good])
    assert run(weights, folder, "--table", folder / "jobs.csv") == 0
    assert not (folder / "jobs.failed.csv").exists()


def test_wrong_input_is_found_before_work_starts(weights, folder, tmp_path, caplog):
    stranger = tmp_path / "stranger"
    stranger.mkdir()
    (stranger / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    incomplete = tmp_path / "incomplete"
    incomplete.mkdir()
    (incomplete / "model_index.json").write_text('{"_class_name": "CFLDPipeline"}')
    write_table(folder / "columns.csv", [("a", "b")], columns=("image", "target"))
    write_table(folder / "twice.csv", [("a", "b", "o.png"), ("c", "d", "o.png")])
    write_table(folder / "dots.csv", [("a", "b", "f/o.png"), ("c", "d", "f/../f/o.png")])
    good = one(folder, folder / "b.json")
    for arguments, message in (
        (one(folder, folder / "none.jpg"), "none.jpg: no such file"),
        (("--image", "none.jpg", "--pose", "p.json", "--output", "o.png"), "none.jpg: no such"),
        (one(folder, folder / "b.json", "out.doc"), "ends in no image format; use .png"),
        ((*good, "--weights", "nowhere"), "nowhere: no weights of this project"),
        ((*good, "--weights", stranger), "holds a StableDiffusionPipeline, not a CFLDPipeline"),
        ((*good, "--weights", incomplete), "incomplete: cannot be loaded"),
        ((*good, "--scheduler", "fast"), "--scheduler fast: choose one of ddim, ddim"),
        ((*good, "--device", "toaster"), "--device toaster"),
        ((*good, "--pose-frame", "9", "9"), "do not lie in a frame of height, width (9, 9)"),
        (("--table", folder / "none.csv"), "none.csv: cannot be read as a table"),
        (("--table", folder / "columns.csv"), "columns.csv: has no column output, pose"),
        (("--table", folder / "dots.csv"), "1 outputs stand in several rows, such as f/o.png"),
        (("--table", folder / "twice.csv"), "1 outputs stand in several rows, such as o.png"),
        ((*one(folder, folder / "a.png"), "--pose-network", "n.onnx"), "n.onnx: no such file"),
    ):
        caplog.clear()
        assert run(weights, folder, *arguments) == 2, message
        assert message in caplog.text
    assert not (folder / "out.png").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--scheduler", "pndm"), "--scheduler pndm: choose one of ddim, ddimparallel"),
        (("--scheduler", "LCMScheduler", "--steps", "60"), "--steps 60: the scheduler lcm cannot"),
        (("--steps", "2000"), "--steps 2000: the scheduler ddpm cannot take them"),
    ],
)
def test_a_scheduler_that_does_not_fit_the_weights(weights, folder, caplog, options, message):
    assert run(weights, folder, *one(folder, folder / "b.json"), *options) == 2
    assert message in caplog.text
    assert not (folder / "out.png").exists()


def test_an_output_that_cannot_be_written_is_refused_before_work(weights, folder, caplog):
    (folder / "folder.png").mkdir()
    for output, message in (
        ("out.psd", "out.psd: ends in no image format; use .png or .jpg"),
        ("out.fits", "out.fits: ends in no image format"),
        ("out.mpg", "out.mpg: ends in no image format"),
        ("out.h5", "out.h5: ends in no image format"),
        ("out.xbm", "out.xbm: ends in no image format"),
        ("folder.png", "folder.png: is a folder; name a file"),
    ):
        caplog.clear()
        # No folder of weights, which would be the first thing to fail.
        assert main(["--weights", "none", *map(str, one(folder, folder / "b.json", output))]) == 2
        assert message in caplog.text


@pytest.mark.parametrize("extension", ["jpg", "webp", "gif", "bmp", "tif", "tiff", "ppm", "PNG"])
def test_every_format_can_be_written(folder, extension):
    path = folder / f"out.{extension}"
    check_output(str(path))
    save_image(Image.fromarray(FIRST.image), path)
    save_image(Image.fromarray(FIRST.image[..., 0] > 99), folder / f"mask.{extension}")
    assert np.abs(pixels(path) - FIRST.image).mean() < 9
    assert not list(folder.glob(".*"))


def test_damaged_weights(weights, folder, tmp_path, caplog):
    damaged = tmp_path / "damaged"
    shutil.copytree(weights, damaged)
    path = damaged / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    del tensors["conv_in.weight"]
    save_file(tensors, path)
    options = one(folder, folder / "b.json")
    assert run(weights, folder, *options, "--weights", damaged) == 2
    assert "damaged: cannot be loaded: " in caplog.text
    assert "conv_in.weight" in caplog.text


def test_what_a_table_left_out_is_known_when_it_stops(weights, folder, caplog):
    (folder / "file").write_bytes(b"not a folder")
    rows = [
        (folder / "none.png", folder / "b.json", folder / "0.png"),
        (folder / "a.png", folder / "b.json", folder / "file" / "1.png"),
        (folder / "a.png", folder / "b.json", folder / "2.png"),
        (folder / "a.png", folder / "a.png", folder / "3.png"),
    ]
    write_table(folder / "jobs.csv", rows)
    write_table(folder / "jobs.failed.csv", [("old", "old", "old")])
    table = ("--table", folder / "jobs.csv", "--batch-size", 2)
    # The last row's pose needs a network, which is not there: that stops the whole table.
    assert run(weights, folder, *table, "--pose-network", folder / "none.onnx") == 2
    with (folder / "jobs.failed.csv").open() as file:
        failed = [row["reason"] for row in csv.DictReader(file)]
    assert len(failed) == 2
    assert "none.png: no such file" in failed[0]
    assert "1.png: cannot be written" in failed[1]
    assert (folder / "2.png").is_file()
    assert not list(folder.glob(".*"))


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("--image", "a.png"),
        ("--image", "a.png", "--pose", "b.png", "--output", "c.png", "--table", "t.csv"),
        ("--table", "t.csv", "--steps", "0"),
        ("--table", "t.csv", "--pose-scale", "nan"),
        ("--table", "t.csv", "--appearance-scale", "inf"),
        ("--table", "t.csv", "--seed", str(2**70)),
        ("--table", "t.csv", "--seed", "-1"),
    ],
)
def test_wrong_usage(weights, folder, arguments):
    with pytest.raises(SystemExit, match="2"):
        run(weights, folder, *arguments)


@pytest.mark.slow
def test_the_command_as_a_process(weights, folder):
    command = [sys.executable, "-m", "cfld.generate", "--weights", weights, *FAST]
    command += [str(argument) for argument in one(folder, folder / "b.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "out.png is written" in done.stderr
    missing = subprocess.run([*command, "--pose", "none.json"], capture_output=True, text=True)
    assert missing.returncode == 2
    assert "Traceback" not in missing.stderr
