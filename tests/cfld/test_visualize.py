from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from cfld.codec import build_codec
from cfld.pipeline import CFLDPipeline
from cfld.visualize import main
from preprocessing.figures import draw_figure
from tests.keypoint_files import write_openpose_json

FIGURE = draw_figure(0, 0, size=(96, 64), seed=0)
TILE = (192, 128)


@pytest.fixture
def folder(tmp_path):
    Image.fromarray(FIGURE.image).save(tmp_path / "anna.png")
    write_openpose_json(tmp_path / "anna.json", FIGURE.keypoints[None])
    return tmp_path


def run(weights, folder, *arguments):
    given = ["--weights", weights, "--image", folder / "anna.png", "--output", folder / "look"]
    options = ["--steps", "5", "--device", "cpu"]
    return main([str(word) for word in (*given, *options, *arguments)])


def written(folder):
    return {path.name for path in (folder / "look").iterdir()}


def count_tiles(path, label_px=28):
    """Rows and the least number of columns that a grid of pictures has room for."""
    with Image.open(path) as grid:
        assert grid.mode == "RGB"
        return grid.height // (TILE[0] + label_px - 2), grid.width // (TILE[1] + 6)


def test_all_views_are_written(weights, folder):
    assert run(weights, folder, "--pose", folder / "anna.json") == 0
    assert written(folder) == {"attention.png", "biases.png", "pose.png", "steps.png"}
    assert count_tiles(folder / "look" / "attention.png") == (1, 5)  # the photo and 4 queries
    assert count_tiles(folder / "look" / "biases.png") == (3, 4)  # 3 levels, 2 layers, 2 views
    assert count_tiles(folder / "look" / "pose.png") == (3, 7)
    assert count_tiles(folder / "look" / "steps.png")[0] == 2  # the latents, and clean ones
    for path in (folder / "look").iterdir():
        assert np.asarray(Image.open(path)).std() > 20


def test_without_a_pose_only_the_source_is_shown(weights, folder):
    assert run(weights, folder) == 0
    assert written(folder) == {"attention.png", "biases.png"}


def test_views_are_chosen(weights, folder):
    assert run(weights, folder, "--show", "pose", "--pose", folder / "anna.json") == 0
    assert written(folder) == {"pose.png"}


def test_the_number_of_steps_is_chosen(weights, folder):
    words = ("--show", "steps", "--pose", folder / "anna.json", "--shown-steps")
    widths = []
    for number in (2, 9):
        assert run(weights, folder, *words, number) == 0
        widths.append(Image.open(folder / "look" / "steps.png").width)
    assert 2 * (widths[1] - 6) == 5 * (widths[0] - 6)  # no more than there are


def test_a_scheduler_that_predicts_nothing_clean_shows_the_latents(weights, folder):
    words = ("--show", "steps", "--pose", folder / "anna.json", "--scheduler")
    assert run(weights, folder, *words, "dpmsolvermultistep") == 0
    assert count_tiles(folder / "look" / "steps.png")[0] == 1


def test_wrong_input_is_found_before_work_starts(weights, folder, caplog):
    for arguments, message in (
        (("--show", "steps"), "--show steps: pose and steps need --pose"),
        (("--block", 2), "--block 2: there are 1 blocks"),
        (("--pose", folder / "none.json"), "none.json: no such file"),
        (("--weights", folder), "no weights of this project"),
        (("--output", folder / "anna.json"), "anna.json: is a file; name a folder"),
    ):
        caplog.clear()
        assert run(weights, folder, *arguments) == 2
        assert message in caplog.text
    assert not (folder / "look").exists()


def test_models_without_queries_or_biases_are_refused(micro, build, folder, caplog):
    config = micro["pixels"]
    config = replace(
        config,
        prompt_decoder=replace(config.prompt_decoder, kind="features"),
        appearance=replace(config.appearance, biases="nothing"),
    )
    weights = folder / "weights"
    CFLDPipeline.from_model(build(config), build_codec(config.codec)).save_pretrained(weights)
    assert run(weights, folder) == 2
    assert "a prompt of kind 'features' has no queries to show" in caplog.text
    assert run(weights, folder, "--show", "biases") == 2
    assert "there are no appearance biases to show" in caplog.text


@pytest.mark.parametrize("arguments", [("--show", "all"), ("--shown-steps", "0")])
def test_wrong_usage(weights, folder, arguments):
    with pytest.raises(SystemExit, match="2"):
        run(weights, folder, *arguments)
