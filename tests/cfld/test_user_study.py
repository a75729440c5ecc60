"""The user study: pages made from folders, played through in a browser, answers scored."""

import base64
import hashlib
import itertools
import json
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Page, sync_playwright

from cfld.user_study import StudyError, main, score_answers

NUM = 5
NAMES = [f"person_{i}" for i in range(12)]


def save_image(path: Path, size: tuple[int, int]) -> None:
    seed = int.from_bytes(
        hashlib.sha256(str(path.stem + path.parent.name).encode()).digest()[:4], "big"
    )
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """Photos of twelve persons, and two methods' images of ten pairs."""
    for name in NAMES:
        save_image(tmp_path / "real" / f"{name}.png", (48, 33))
    for method in ("ours", "theirs"):
        for source, target in itertools.pairwise(NAMES[:11]):
            save_image(tmp_path / method / f"{source}_2_{target}.png", (32, 22))
    return tmp_path


def make(folders: Path, *more: object) -> int:
    methods = [f"{name}={folders / folder}" for name, folder in (("A", "ours"), ("B", "theirs"))]
    return main(
        ["make", "--generated", *methods, "--real", str(folders / "real"), "--output",
         str(folders / "study"), "--size", "32", "22", "--num-images", str(NUM), *map(str, more)]
    )  # fmt: skip


def page_data(folders: Path, name: str) -> dict:
    text = (folders / "study" / f"{name}.html").read_text()
    data = json.loads(text.split('type="application/json">')[1].split("</script>")[0])
    data["truth"] = json.loads(zlib.decompress(base64.b64decode(data["seal"])))
    return data


@pytest.fixture
def browser_page(chromium: str, tmp_path: Path) -> Iterator[Page]:
    with sync_playwright() as playwright:
        context = playwright.chromium.launch_persistent_context(
            str(tmp_path / "profile"), executable_path=chromium, args=["--no-sandbox"]
        )
        yield context.new_page()
        context.close()


def save_answers(page: Page, folder: Path) -> Path:
    with page.expect_download() as download:
        page.keyboard.press("Enter")
    path = folder / download.value.suggested_filename
    download.value.save_as(path)
    return path


def test_played_through_in_a_browser(
    folders: Path, browser_page: Page, capsys: pytest.CaptureFixture[str]
) -> None:
    assert make(folders) == 0
    requests: list[str] = []
    page = browser_page
    page.on("request", lambda request: requests.append(request.url))
    problems: list[str] = []
    page.on("console", lambda message: problems.append(message.text))
    page.on("pageerror", lambda error: problems.append(str(error)))

    # By keyboard: all are called real; one answer is taken back, the page is left in between.
    page.goto((folders / "study" / "real-or-generated-1.html").as_uri())
    for key in ("r", "ArrowRight", "Backspace", "ArrowLeft", "R"):
        page.keyboard.press(key)
    assert page.locator("#foot").inner_text().startswith(f"3 of {2 * NUM}")
    page.reload()
    assert page.locator("#foot").inner_text().startswith(f"3 of {2 * NUM}")
    page.keyboard.press("x")
    for _ in range(2 * NUM - 3):
        page.keyboard.press("1")
    assert "Thank you" in page.locator("#question").inner_text()
    first = save_answers(page, folders)

    # By mouse: always the image of method B.
    page.goto((folders / "study" / "best-match.html").as_uri())
    for order in page_data(folders, "best-match")["truth"]["methods"]:
        page.locator("button.choice").nth(order.index("B")).click()
    second = save_answers(page, folders)

    assert problems == []
    assert {url.split(":")[0] for url in requests} <= {"file", "data", "blob"}
    method = page_data(folders, "real-or-generated-1")["truth"]["method"]
    capsys.readouterr()
    scores = folders / "scores.json"
    assert main(["score", str(first), str(second), "--output", str(scores)]) == 0
    printed = capsys.readouterr().out
    assert f"| G2R {method} | 100.0 % | 56.6 to 100.0 % | 5/5 |" in printed
    assert f"| R2G {method} | 0.0 % | 0.0 to 43.4 % | 0/5 |" in printed
    assert "| Jab A | 0.0 % |" in printed
    assert "| Jab B | 100.0 % |" in printed
    assert {each["metric"] for each in json.loads(scores.read_text())} == {"G2R", "R2G", "Jab"}


def test_pages_show_what_they_should(folders: Path) -> None:
    assert make(folders) == 0
    key = json.loads((folders / "study" / "key.json").read_text())
    first, second = (page_data(folders, f"real-or-generated-{i}") for i in (1, 2))
    assert {first["truth"]["method"], second["truth"]["method"]} == {"A", "B"}
    assert key["pages"]["real-or-generated-1"] == first["truth"]["method"]
    shown = {}
    for data in (first, second):
        assert sorted(data["truth"]["truth"]) == ["generated"] * NUM + ["real"] * NUM
        reals = zip(data["items"], data["truth"]["truth"], strict=True)
        shown[data["page"]] = {item["images"][0] for item, kind in reals if kind == "real"}
    assert len(set(map(frozenset, shown.values()))) == 1
    match = page_data(folders, "best-match")
    assert len(match["items"]) == NUM
    targets = {item["target"] for item in match["items"]}
    assert len(targets) == NUM
    assert not targets & shown["real-or-generated-1"]
    for path in (folders / "study").glob("*.html"):
        assert "ours" not in path.read_text()


def test_the_seed_decides(folders: Path) -> None:
    def pages() -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in (folders / "study").iterdir()}

    assert make(folders) == 0
    first = pages()
    assert make(folders) == 0
    assert pages() == first
    assert make(folders, "--seed", 1) == 0
    assert pages().keys() == first.keys()
    assert pages() != first


def test_one_method_has_no_best_match(folders: Path) -> None:
    arguments = ["--real", str(folders / "real"), "--output", str(folders / "study")]
    only = ["make", "--generated", f"A={folders / 'ours'}", "--num-images", "3", *arguments]
    assert main(only) == 0
    assert not (folders / "study" / "best-match.html").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--num-images", "11"], "have images of 10 common targets, 11 are needed"),
        (["--num-images", "7"], "has 5 photos beside the 7 targets, 7 are needed"),
        (["--generated", "A"], "give NAME=DIR with a folder that exists"),
        (["--real", "nowhere"], "nowhere is no folder"),
    ],
)
def test_studies_that_cannot_be_made(
    folders: Path, caplog: pytest.LogCaptureFixture, change: list[str], message: str
) -> None:
    assert make(folders, *change) == 2
    assert message in caplog.text


def test_methods_of_one_name(folders: Path, caplog: pytest.LogCaptureFixture) -> None:
    twice = [f"A={folders / 'ours'}"] * 2
    assert make(folders, "--generated", *twice) == 2
    assert "1 to 9 methods of different names" in caplog.text


@pytest.mark.parametrize(
    "arguments", [("--num-images", "0"), ("--seed", "-1"), ("--size", "0", "9")]
)
def test_wrong_usage(folders: Path, arguments: tuple[str, ...]) -> None:
    with pytest.raises(SystemExit, match="2"):
        make(folders, *arguments)


def test_scores_that_cannot_be_written(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "answers.json").write_text(json.dumps(answers()))
    (tmp_path / "folder").mkdir()
    command = ["score", str(tmp_path / "answers.json"), "--output", str(tmp_path / "folder")]
    assert main(command) == 1
    assert "stopped: " in caplog.text


def answers(**changes: object) -> dict:
    truth = {"method": "A", "truth": ["real", "generated", "real"]}
    seal = base64.b64encode(zlib.compress(json.dumps(truth).encode())).decode()
    document = {"format": "cfld-user-study", "version": 1, "study": "s", "page": "p",
                "participant": "x", "answers": ["real", "real", "generated"],
                "seal": seal}  # fmt: skip
    return document | changes


def test_scores_of_known_answers() -> None:
    """Wilson's interval for 1 of 2 is (1 ± z / √(2 + z²)) / 2 with z = 1.96."""
    rates = score_answers({"a": answers(), "b": answers(participant="y", answers=["generated"])})
    assert [(r.metric, r.num_chosen, r.num_judged) for r in rates] == [("G2R", 1, 1), ("R2G", 2, 3)]
    (_, rate) = score_answers({"a": answers()})
    assert rate.value == 0.5
    half_width = 1.959964 / np.sqrt(2 + 1.959964**2) / 2
    assert rate.interval == pytest.approx((0.5 - half_width, 0.5 + half_width), abs=1e-6)


@pytest.mark.parametrize(
    ("documents", "message"),
    [
        ([answers(), answers()], "b: the same answers as a; give each once"),
        ([answers(), answers(study="t", participant="y")], "answers to 2 different studies"),
        ([answers(answers=["real"] * 4)], "a: its answers do not fit its questions"),
        ([answers(answers=["perhaps"])], "a: its answers do not fit its questions"),
        ([answers(seal="?")], "a: its seal is damaged"),
        ([answers(version=2)], "a: its format is not cfld-user-study 1"),
        ([answers(more=1)], "a: no answer file of a user study"),
        ([[]], "a: no answer file of a user study"),
    ],
)
def test_answers_that_cannot_be_scored(documents: list, message: str) -> None:
    with pytest.raises(StudyError, match=message):
        score_answers(dict(zip("ab", documents, strict=False)))


def test_unfinished_answers_are_mentioned(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "answers.json"
    path.write_text(json.dumps(answers(answers=["real"])))
    with caplog.at_level("WARNING"):
        assert main(["score", str(path)]) == 0
    assert "1 of 3 questions answered" in caplog.text
    path.write_text("{")
    assert main(["score", str(path)]) == 2
    assert "no answer file" in caplog.text
