"""The evaluation of a model: images by seed and pair, resumed runs, self-checks, bad input."""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from playwright.sync_api import sync_playwright

from cfld.codec import build_codec
from cfld.evaluate import main
from cfld.evaluation.pair_images import choose_pairs, pair_seed
from cfld.evaluation.paper_tables import GROUND_TRUTH, TABLE_5, VAE_RECONSTRUCTION
from cfld.evaluation.photo_source import open_photos
from cfld.evaluation.result_files import find_results, name_of
from cfld.evaluation.studies import GUIDANCE_SCALES
from cfld.pipeline import CFLDPipeline
from preprocessing.figures import draw_figure

NAMES = [f"anna_{view}" for view in range(3)] + [f"bo_{view}" for view in range(3)]
PAIRS = [(a, b) for a in NAMES for b in NAMES if a != b and a[:2] == b[:2]]
METRICS = ("psnr", "ssim_paper", "ssim_256", "ssim")


def save_pipeline(folder: Path, model, config, change: Callable | None = None) -> Path:
    pipeline = CFLDPipeline.from_model(model, build_codec(config.codec))
    if change:
        change(pipeline)
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def weights(micro, build, tmp_path_factory) -> Path:
    config = micro["pixels"]
    return save_pipeline(tmp_path_factory.mktemp("weights"), build(config, stirred=True), config)


@pytest.fixture(scope="module")
def shards(write_shards, tmp_path_factory) -> Path:
    photos = {}
    for name in NAMES:
        figure = draw_figure(NAMES.index(name) // 3, NAMES.index(name) % 3, size=(32, 32), seed=0)
        photos[name] = (Image.fromarray(figure.image), figure.keypoints, "test")
    folder = tmp_path_factory.mktemp("photos") / "shards"
    return write_shards(folder, photos, PAIRS, dataset="synthetic")


def run(weights: Path, shards: Path, output: Path, *more: object) -> int:
    arguments = [
        "--shards", shards, "--output", output, "--size", 128, 64, "--steps", 3, "--device", "cpu",
        "--metrics", *METRICS,
    ]  # fmt: skip
    if weights is not None:
        arguments += ["--weights", weights]
    return main([str(each) for each in (*arguments, *more)])


@pytest.fixture(scope="module")
def scored(weights, shards, tmp_path_factory) -> Path:
    """The output of a whole run."""
    output = tmp_path_factory.mktemp("scored")
    assert run(weights, shards, output) == 0
    return output


def read_images(output: Path) -> dict[str, np.ndarray]:
    return {
        path.stem: np.asarray(Image.open(path)).astype(int) for path in output.glob("images/*.png")
    }


def refused(caplog, weights, shards, output, *more: object) -> str:
    caplog.clear()
    assert run(weights, shards, output, *more) == 2
    return caplog.text


def test_every_pair_has_an_image_under_a_known_name(scored, shards):
    found = find_results(scored / "images", open_photos(str(shards), "test"))
    assert found.pattern == "{source}_2_{target}"
    assert set(found.files) == set(PAIRS)
    assert found.surplus == found.missing == ()
    images = read_images(scored)
    assert all(image.shape == (32, 32, 3) for image in images.values())
    assert all(image.std() > 5 for image in images.values())


def test_the_outcome_is_that_of_scoring_the_folder(scored, weights, shards, tmp_path):
    ours = json.loads((scored / "metrics.json").read_text())
    options = ("--generated", scored / "images", "--resize")
    assert run(None, shards, tmp_path, *options) == 0
    theirs = json.loads((tmp_path / "metrics.json").read_text())
    assert ours["scores"] == theirs["scores"]
    assert ours["num_images"] == len(PAIRS)
    table = pq.read_table(scored / "scores.parquet")
    assert set(table["name"].to_pylist()) == {name_of(pair) for pair in PAIRS}
    assert table.column_names == ["name", *METRICS]
    kept = json.loads((scored / "generation.json").read_text())
    assert kept.items() <= ours["settings"].items()
    assert kept["scheduler"] == "ddpm"
    assert kept["num_steps"] == 3


def test_self_checks_stand_in_every_output(scored):
    checks = json.loads((scored / "metrics.json").read_text())["self_checks"]
    assert checks[GROUND_TRUTH]["psnr"] == "inf"
    assert checks[GROUND_TRUTH]["ssim_paper"] == 1.0
    reconstructed = checks[VAE_RECONSTRUCTION]
    # The pixel codec loses nothing; what differs is how Pillow and torch resize, and truncation.
    assert 45 < reconstructed["psnr"] < 60
    assert 0.999 < reconstructed["ssim_paper"] < 1
    assert {path.stem for path in scored.glob("reconstructions/*.png")} == set(NAMES)
    text = (scored / "tables.md").read_text()
    assert "| Metric | Value | 95 % interval | Ground truth | VAE reconstruction |" in text
    row = next(line for line in text.splitlines() if line.startswith("| Ground truth"))
    assert "| ∞ | ∞ |" in row
    assert "dataset 'synthetic', so that the paper's figures, of 'market1501', do not" in text


def test_images_depend_on_pair_and_seed_alone(scored, weights, shards, tmp_path):
    expected = read_images(scored)
    assert run(weights, shards, tmp_path / "one", "--batch-size", 1, "--num-pairs", 5) == 0
    found = read_images(tmp_path / "one")
    assert len(found) == 5
    for name, image in found.items():
        assert np.abs(image - expected[name]).max() <= 1
    notes = json.loads((tmp_path / "one" / "metrics.json").read_text())["notes"]
    assert "Only 5 of the 12 pairs, chosen by a hash of their names, were generated." in notes
    assert run(weights, shards, tmp_path / "two", "--seed", 1, "--num-pairs", 2) == 0
    for name, image in read_images(tmp_path / "two").items():
        assert np.abs(image - expected[name]).max() > 1


def test_chosen_pairs_grow_and_seeds_differ():
    chosen = [set(choose_pairs(PAIRS[::step], num)) for num in range(13) for step in (1, -1)]
    assert chosen[::2] == chosen[1::2]
    assert all(few < more for few, more in zip(chosen[::2], chosen[2::2], strict=False))
    assert choose_pairs(PAIRS, None) == tuple(sorted(PAIRS)) == choose_pairs(PAIRS, 99)
    seeds = {pair_seed(seed, pair) for seed in range(2) for pair in PAIRS}
    assert len(seeds) == 2 * len(PAIRS)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_a_run_goes_on_where_it_was_stopped(scored, weights, shards, tmp_path):
    output = tmp_path / "output"
    shutil.copytree(scored, output)
    expected = read_images(scored)
    kept, *lost = sorted((output / "images").iterdir())
    for path in lost[:5]:
        path.unlink()
    lost[0].with_name(f".{lost[0].name}.1.tmp").write_bytes(kept.read_bytes()[:99])
    (output / "metrics.json").unlink()
    modified = kept.stat().st_mtime_ns
    assert run(weights, shards, output) == 0
    assert kept.stat().st_mtime_ns == modified
    for name, image in read_images(output).items():
        assert np.abs(image - expected[name]).max() <= 1
    assert (output / "metrics.json").is_file()


def test_other_settings_need_another_folder(scored, weights, shards, tmp_path, caplog):
    text = refused(caplog, weights, shards, scored, "--steps", 4, "--seed", 7)
    assert "num_steps 3 (now 4), seed 0 (now 7); give another --output" in text
    output = tmp_path / "output"
    assert run(weights, shards, output, "--scheduler", "nonsense", "--num-pairs", 2) == 2
    assert "--scheduler nonsense: choose one of" in caplog.text
    text = refused(caplog, weights, shards, output, "--steps", 2000, "--num-pairs", 2)
    assert "--steps 2000: the scheduler ddpm cannot take them" in text
    # Nothing came of it, so the folder is free for other settings.
    assert run(weights, shards, output, "--num-pairs", 2) == 0
    assert run(weights, shards, output, "--num-pairs", 4, "--batch-size", 3) == 0
    (output / "generation.json").unlink()
    assert "holds images, but no generation.json" in refused(caplog, weights, shards, output)


def test_a_folder_serves_one_process_at_a_time(weights, shards, tmp_path, caplog):
    descriptor = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        text = refused(caplog, weights, shards, tmp_path)
    finally:
        os.close(descriptor)
    assert "another process works here; wait for it" in text
    assert list(tmp_path.iterdir()) == []


def test_what_is_needed_is_missing(scored, weights, shards, tmp_path, caplog):
    photos = tmp_path / "photos"
    shutil.copytree(scored / "reconstructions", photos)
    output = tmp_path / "output"
    listed = tmp_path / "pairs.csv"
    listed.write_text("from,to\nanna_0.jpg,anna_1.jpg\n")
    text = refused(caplog, weights, photos, output, "--pairs", listed)
    assert "1 targets have no keypoints, such as ['anna_1']; give a shard set" in text
    assert "there are no pairs of split 'test'" in refused(caplog, weights, photos, output)
    listed.write_text("from,to\ncarl_0.jpg,anna_1.jpg\n")
    text = refused(caplog, weights, shards, output, "--pairs", listed)
    assert "1 sources are missing, such as ['carl_0']" in text
    text = refused(caplog, tmp_path, shards, output)
    assert "no weights of this project" in text
    assert "--device nowhere" in refused(caplog, weights, shards, output, "--device", "nowhere")
    assert not output.exists()


def test_scores_that_cannot_be_had(weights, shards, tmp_path, caplog, metric_weights):
    text = refused(caplog, weights, shards, tmp_path / "output", "--size", 50, 50)
    assert "--metrics: ssim_paper has a window of 51 pixels, the images are 50x50" in text
    fid = ("--metrics", "fid", "--metric-weights", metric_weights, "--reference", shards)
    split = ("--reference-split", "test")
    text = refused(caplog, weights, shards, tmp_path / "output", *fid, *split, "--num-pairs", 1)
    assert "FID needs at least 2 generated images, this is 1" in text
    assert not (tmp_path / "output").exists()


@pytest.mark.parametrize(
    "metrics", [["lpips"], pytest.param(["fid_paper"], marks=pytest.mark.slow)]
)
def test_networks_score_the_self_checks_too(weights, shards, tmp_path, metric_weights, metrics):
    options = (
        "--metrics", *metrics, "--metric-weights", metric_weights, "--num-pairs", 3,
        "--reference", shards, "--reference-split", "test", "--cache", tmp_path / "cache",
    )  # fmt: skip
    assert run(weights, shards, tmp_path / "output", *options) == 0
    document = json.loads((tmp_path / "output" / "metrics.json").read_text())
    checks = document["self_checks"]
    truth, reconstructed = (checks[name] for name in (GROUND_TRUTH, VAE_RECONSTRUCTION))
    (metric,) = metrics
    value = document["scores"][metric]["value"]
    if metric == "lpips":
        assert truth["lpips"] == 0 < reconstructed["lpips"] < value
    else:
        assert 0 < truth[metric] == pytest.approx(reconstructed[metric], rel=0.2)
        assert truth[metric] < value
        assert document["settings"]["FID reference images"] == len(NAMES)


def test_images_that_are_not_finite_end_the_run(micro, build, shards, tmp_path, caplog):
    config = micro["pixels"]

    def spoil(pipeline) -> None:
        with torch.no_grad():
            pipeline.unet.conv_out.bias.fill_(torch.nan)

    weights = save_pipeline(tmp_path / "weights", build(config), config, spoil)
    assert run(weights, shards, tmp_path / "output") == 1
    assert "8 images hold NaN or infinite values, such as anna_0_2_anna_1" in caplog.text
    assert not list(tmp_path.glob("output/images/*"))


def test_a_damaged_image_is_named(scored, weights, shards, tmp_path, caplog):
    output = tmp_path / "output"
    shutil.copytree(scored, output)
    path = output / "images" / "bo_0_2_bo_1.png"
    path.write_bytes(path.read_bytes()[:200])
    assert "1 are no readable images:\n  bo_0_2_bo_1.png" in refused(
        caplog, weights, shards, output
    )


def test_a_vae_is_reconstructed_without_noise(micro, build, shards, tmp_path):
    config = micro["vae"]
    weights = save_pipeline(tmp_path / "weights", build(config), config)
    for name in ("one", "two"):
        options = ("--num-pairs", 2, "--batch-size", 2, "--metrics", "psnr")
        assert run(weights, shards, tmp_path / name, *options) == 0
    (first, *_), (second, *_) = (
        sorted(tmp_path.glob(f"{name}/reconstructions/*")) for name in ("one", "two")
    )
    assert first.read_bytes() == second.read_bytes()


def test_sweep_of_guidance(weights, shards, tmp_path, capsys, chromium):
    options = ("--sweep", "guidance", "--scales", "1.5,4", "--num-pairs", 2, "--metrics", "psnr")
    assert GUIDANCE_SCALES.keys() == TABLE_5.rows.keys()
    assert run(weights, shards, tmp_path, *options) == 0
    table = capsys.readouterr().out
    rows = [line.split(" | ")[0].removeprefix("| ") for line in table.splitlines()[2:]]
    assert rows == [*GUIDANCE_SCALES, "1.5, 4.0", GROUND_TRUTH, VAE_RECONSTRUCTION]
    documents = json.loads((tmp_path / "metrics.json").read_text())
    assert list(documents) == rows[:-2]
    for label, document in documents.items():
        pose, appearance = map(float, label.split(", ")[-2:])
        folder = tmp_path / f"pose_{pose}_appearance_{appearance}"
        assert json.loads((folder / "metrics.json").read_text()) == document
        assert document["settings"]["pose_scale"] == pose
        assert document["settings"]["appearance_scale"] == appearance
        psnr = document["scores"]["psnr"]["value"]
        assert f"| {psnr:.3f} |\n" in next(
            line + "\n" for line in table.splitlines() if line.startswith(f"| {label} |")
        )
    assert len({document["scores"]["psnr"]["value"] for document in documents.values()}) == 6
    assert len(list(tmp_path.glob("*/reconstructions"))) == 1
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page()
        page.goto((tmp_path / "report.html").as_uri())
        assert page.title() == TABLE_5.title
        assert page.locator(".strips tr").count() == 3
        assert page.locator(".strips img").count() == 2 * (2 + 6)
        page.get_by_role("link", name="1.5, 4.0").click()
        page.wait_for_url("**/pose_1.5_appearance_4.0/report.html")
        assert page.locator("h1").inner_text() == f"Scores of {weights.name}"
        browser.close()


def test_ablations(weights, shards, tmp_path, capsys, caplog):
    options = ("--ablations", f"B3={weights}", f"mine={weights}", "--num-pairs", 2)
    assert run(None, shards, tmp_path, *options) == 0
    text = (tmp_path / "tables.md").read_text()
    assert "| Method | LPIPS, paper | LPIPS, ours | SSIM, paper | SSIM, ours |" in text
    ours = json.loads((tmp_path / "metrics.json").read_text())["B3"]["scores"]["ssim_paper"][
        "value"
    ]
    assert f"| B3 | 0.1615 |  | 0.7293 | {ours:.4f} |" in text
    assert f"| mine |  |  |  | {ours:.4f} |" in text
    assert "The paper's figures are those of images of 256x176." in text
    assert (tmp_path / "mine" / "report.html").is_file()
    nowhere = ("--ablations", f"B3={weights}", f"B4={tmp_path}")
    assert "no weights of this project" in refused(caplog, None, shards, tmp_path / "x", *nowhere)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--sweep", "guidance", "--generated", "."], "--sweep needs --weights"),
        (["--weights", ".", "--scales", "1,2"], "--scales needs --sweep guidance"),
        (["--weights", ".", "--sweep", "guidance", "--scales", "1"], "'1' is not POSE,APPEARANCE"),
        (
            ["--weights", ".", "--resize"],
            "--pattern, --resize and --allow-missing need --generated",
        ),
        (["--weights", ".", "--sweep", "guidance", "--scales", "nan,1"], "nan is not finite"),
        (["--weights", ".", "--seed", str(2**70)], "is not between 0 and"),
        (["--ablations", "B1=.", "B1=."], r"--ablations: \['B1', 'B1'\] has a name twice"),
        (["--ablations", "../x=."], "'../x=.' is not NAME=DIR"),
        (["--ablations", "B1"], "'B1' is not NAME=DIR"),
        (["--weights", ".", "--num-pairs", "0"], "0 is not at least 1"),
        (["--weights", ".", "--generated", "."], "not allowed with argument"),
        ([], "one of the arguments --weights --ablations --generated is required"),
        (["--weights", ".", "--metric-weights", "nowhere"], "nowhere does not exist"),
    ],
)
def test_wrong_usage(options, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["--shards", "shards", "--output", "output", *options])
    assert_match(message, capsys.readouterr().err)


def assert_match(pattern: str, text: str) -> None:
    with pytest.raises(AssertionError, match=pattern):
        raise AssertionError(text)


def command(weights: Path, shards: Path, output: Path, *more: object) -> list[str]:
    arguments = [
        "--weights", weights, "--shards", shards, "--output", output, "--size", 128, 64,
        "--device", "cpu", "--metrics", *METRICS, *more,
    ]  # fmt: skip
    return [sys.executable, "-m", "cfld.evaluate", *map(str, arguments)]


@pytest.mark.slow
def test_workers_make_the_same_images_also_after_a_kill(scored, weights, shards, tmp_path):
    expected = read_images(scored)
    options = command(weights, shards, tmp_path, "--steps", 3, "--workers", 2, "--batch-size", 1)
    started = subprocess.Popen(options, stderr=subprocess.DEVNULL)
    while not list(tmp_path.glob("images/*.png")):
        assert started.poll() is None
        time.sleep(0.01)
    workers = subprocess.run(
        ["pgrep", "-P", str(started.pid)], capture_output=True, text=True, check=True
    ).stdout.split()
    started.send_signal(signal.SIGKILL)
    started.wait()
    assert len(workers) >= 2
    deadline = time.monotonic() + 30
    while any(Path(f"/proc/{worker}").exists() for worker in workers):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert 0 < len(read_images(tmp_path)) < len(PAIRS)
    done = subprocess.run(options, capture_output=True, text=True, check=True)
    assert "are there" in done.stderr
    found = read_images(tmp_path)
    assert found.keys() == expected.keys()
    for name, image in found.items():
        assert np.abs(image - expected[name]).max() <= 1


@pytest.mark.slow
def test_what_stops_a_worker_stops_the_run(weights, shards, tmp_path):
    options = command(weights, shards, tmp_path, "--workers", 2, "--scheduler", "nonsense")
    done = subprocess.run(options, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "--scheduler nonsense: choose one of" in done.stderr
    assert "Traceback" not in done.stderr
