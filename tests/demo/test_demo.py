import json
import subprocess
import sys

import pytest

SMALL = ["--persons", "12", "--pairs-per-person", "1", "--sampling-steps", "2", "--set",
         "steps=4", "pictures.every_steps=2", "pictures.num_pairs=2"]  # fmt: skip


def run_demo(output, *options):
    command = [sys.executable, "-m", "demo", "--output", str(output), *options]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_the_whole_way_and_back_to_where_it_was(tmp_path, chromium):
    """Everything from nothing to the page on two ranks; run again, nothing is done twice."""
    first = run_demo(tmp_path, *SMALL)
    assert first.returncode == 0, first.stderr
    results = json.loads((tmp_path / "work/results.json").read_text())
    assert results["the target itself"]["ssim"] == pytest.approx(1)
    assert results["the target itself"]["silhouette_iou"] > 0.9
    assert results["copy of the source"]["silhouette_iou"] < 0.5
    stages = (tmp_path / "work/stages.json").read_bytes()
    page = (tmp_path / "report.html").read_text()
    assert page.count("<img") == 10 * 6 + 2 * (3 + 2) + 6 * 2
    again = run_demo(tmp_path, *SMALL)
    assert again.returncode == 0, again.stderr
    assert again.stderr.count("done before") == 5
    assert (tmp_path / "work/stages.json").read_bytes() == stages
    assert (tmp_path / "report.html").read_text() == page

    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        opened = browser.new_page()
        opened.goto((tmp_path / "report.html").as_uri())
        assert opened.get_by_role("heading", name="Held-out persons").is_visible()
        assert opened.evaluate("[...document.images].every(each => each.naturalWidth > 0)")
        browser.close()


@pytest.mark.slow
def test_tiny_learns_pose_and_person(tmp_path):
    """In about four minutes on two cores: less than `make demo` shows, but never by chance."""
    done = run_demo(tmp_path, "--set", "steps=600", "pictures.every_steps=0")
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "work/results.json").read_text())
    right, wrong = results["generated"], results["generated from a wrong person's photo"]
    assert right["silhouette_iou"] > 0.7
    assert right["ssim"] > results["mean training image"]["ssim"]
    assert wrong["clothes_error"] - right["clothes_error"] > 0.02
