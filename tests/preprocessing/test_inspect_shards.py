"""The report shows what the set holds; a single wrong byte is found, and named where it can be."""

import base64
import hashlib
import html
import http.server
import io
import json
import re
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from playwright.sync_api import sync_playwright

from cfld.pose import JOINT_COLORS, JOINT_NAMES
from preprocessing.inspect_shards import main
from shards.format import (
    INDEX_SCHEMA,
    PAIRS_SCHEMA,
    ShardSet,
    keypoints_array,
    open_shards,
)

Build = Callable[..., ShardSet]

GREY = 100
EVIL = "<script>alert(1)</script> & co"


@pytest.fixture(scope="module")
def mixed_shards(build: Build, tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    """A table of three persons, one without shoulders, two rows bad; names full of markup."""
    folder = tmp_path_factory.mktemp("mixed")
    keypoints = [[20.0 + joint, 10.0 + 4 * joint, 0.9] for joint in range(18)]
    shoulderless = [
        point if i not in (2, 5) else [None, None, 0] for i, point in enumerate(keypoints)
    ]
    earless = [*keypoints[:16], [None, None, 0], [None, None, 0]]
    photos = [("a", keypoints), ("a", earless), ("a", shoulderless), ("b & b", keypoints),
              ("b & b", earless), ("c", keypoints)]  # fmt: skip
    lines = ["image,person_id,split,keypoints"]
    for number, (person, points) in enumerate(photos):
        Image.new("RGB", (64, 96), (GREY, GREY, GREY)).save(folder / f"{number}.png")
        quoted = json.dumps(points).replace('"', '""')
        lines.append(f'{number}.png,{person},train,"{quoted}"')
    lines += [f"{EVIL}.png,d,train,", "too,few"]
    (folder / "photos.csv").write_text("\n".join(lines) + "\n")
    return build("table", folder / "photos.csv", folder / "shards", "--image-size", "original")


@pytest.fixture
def copied(drawn_shards: ShardSet, tmp_path: Path) -> Path:
    """A copy of the drawn set that a test may damage."""
    return Path(shutil.copytree(drawn_shards.root, tmp_path / "copied"))


def make_page(shards: ShardSet | Path, out: Path, *options: str) -> str:
    root = shards.root if isinstance(shards, ShardSet) else shards
    assert main([str(root), "--out", str(out), *options]) == 0
    return out.read_text(encoding="utf-8")


def table_below(page: str, heading: str) -> list[list[str]]:
    """The cells of the first table after a text."""
    table = page[page.index(heading) :].partition("<table>")[2].partition("</table>")[0]
    return [
        [html.unescape(cell) for cell in re.findall("<t[dh]>(.*?)</t[dh]>", row)]
        for row in table.split("</tr>")[:-1]
    ]


def chart(page: str, title: str) -> dict[str, str]:
    """Labels and values of a chart."""
    svg = page.partition(f'<svg role="img" aria-label="{title}"')[2].partition("</svg>")[0]
    texts = re.findall("<text[^>]*>(.*?)</text>", svg)
    return dict(zip(texts[::2], texts[1::2], strict=True))


def verify(root: Path | str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    capsys.readouterr()
    code = main([str(root), "--verify"])
    return code, capsys.readouterr().out


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def test_counts_and_distributions_of_a_set(mixed_shards: ShardSet, tmp_path: Path) -> None:
    page = make_page(mixed_shards, tmp_path / "new folder" / "report.html")
    assert table_below(page, "<h1>") == [
        ["Split", "images", "persons", "valid", "pairs"],
        ["train", "6", "3", "5", "4"],
    ]
    assert "<h2>4 of 4 pairs of train (source, target)</h2>" in page
    assert chart(page, "Images per person") == {"1": "1", "2": "1", "3": "1"}
    joints = dict.fromkeys((name.replace("_", " ") for name in JOINT_NAMES), "0 (0.0%)")
    joints |= dict.fromkeys(["right ear", "left ear"], "2 (33.3%)")
    joints |= dict.fromkeys(["right shoulder", "left shoulder"], "1 (16.7%)")
    assert chart(page, "Missing joints") == joints
    assert "6 images were not shown to it" in page
    assert chart(page, "People in an image") == {}
    assert ["jpeg_quality", "95"] in table_below(page, "<h2>Settings</h2>")


def test_rejects_are_counted_shown_and_escaped(mixed_shards: ShardSet, tmp_path: Path) -> None:
    page = make_page(mixed_shards, tmp_path / "report.html")
    assert sorted(table_below(page, "<h2>Left out")[1:]) == [
        ["malformed_row", "1", "0"],
        ["missing_image", "1", "0"],
        ["single_image", "1", "1"],
        ["too_few_joints", "1", "1"],
    ]
    (row,) = table_below(page, "<h3>missing_image: 1 of 1</h3>")[1:]
    assert row[0].endswith(f"{EVIL}.png")
    assert row[2:] == ["listing", f"{Path(mixed_shards.root).parent}/photos.csv:8"]
    assert "<script" not in page
    # Images that are stored, but in no pair, are drawn below their reason.
    below = page[page.index("<h3>too_few_joints") :].partition("<h3>")[2].partition("<h3>")[0]
    assert re.findall('<img alt="(.*?)"', below) == ["2.png"]
    assert re.findall("person (.*?)<br>", page).count("b &amp; b") == 2


def test_pairs_are_chosen_by_split_number_and_seed(drawn_shards: ShardSet, tmp_path: Path) -> None:
    def captions(*options: str) -> list[str]:
        page = make_page(drawn_shards, tmp_path / "report.html", *options)
        return re.findall("<figcaption>(.*?)</figcaption>", page)

    index = drawn_shards.read_index()
    names = index["name"].to_pylist()
    pairs = {
        f"person {index['person'][source]}<br>{names[source]}<br>{names[target]}": split
        for source, target, split in zip(
            *(
                drawn_shards.read_pairs()[name].to_pylist()
                for name in ("source", "target", "split")
            ),
            strict=True,
        )
    }
    assert Counter(pairs[each] for each in captions("--pairs", "5")) == {"test": 2, "train": 3}
    some = captions("--pairs", "7", "--split", "train", "--seed", "3")
    assert {pairs[each] for each in some} == {"train"}
    assert len(set(some)) == 7
    assert some == captions("--pairs", "7", "--split", "train", "--seed", "3")
    assert some != captions("--pairs", "7", "--split", "train", "--seed", "4")
    assert len(captions("--pairs", "1000")) == len(pairs)
    assert captions("--pairs", "0") == []


def test_people_that_the_network_saw(copied: Path, tmp_path: Path) -> None:
    index = pq.read_table(copied / "index.parquet")
    people = [1] * 20 + [3, 40] + [None] * (index.num_rows - 22)
    place = index.schema.get_field_index("num_people")
    table = index.set_column(place, index.schema.field(place), pa.array(people, pa.int32()))
    pq.write_table(table, copied / "index.parquet")
    page = make_page(copied, tmp_path / "report.html")
    values = chart(page, "People in an image")
    assert {label: value for label, value in values.items() if value != "0"} == {
        "1": "20",
        "3": "1",
        "30 or more": "1",
    }
    assert f"{index.num_rows - 22} images were not shown to it" in page


def test_page_opens_in_a_browser(
    mixed_shards: ShardSet, drawn_shards: ShardSet, chromium: str, tmp_path: Path
) -> None:
    problems: list[str] = []
    requests: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        tab = browser.new_page()
        tab.on("console", lambda message: problems.append(message.text))
        tab.on("pageerror", lambda error: problems.append(str(error)))
        tab.on("request", lambda request: requests.append(request.url))
        for shards, num_images in ((mixed_shards, 4 * 2 + 2), (drawn_shards, 24 * 2)):
            make_page(shards, tmp_path / "report.html")
            tab.goto((tmp_path / "report.html").as_uri())
            assert tab.title() == f"{shards.manifest.dataset}: {shards.root}"
            sizes = tab.evaluate("[...document.images].map(i => [i.naturalWidth, i.naturalHeight])")
            assert len(sizes) == num_images
            assert all(width > 0 and height == 256 for width, height in sizes)
            assert tab.evaluate("document.querySelectorAll('script').length") == 0
            bars = tab.locator("svg[aria-label='Missing joints'] rect")
            assert bars.count() == len(JOINT_NAMES)
        browser.close()
    assert problems == []
    assert {url.partition(":")[0] for url in requests} <= {"file", "data"}


def test_skeletons_lie_over_the_photos(mixed_shards: ShardSet, tmp_path: Path) -> None:
    page = make_page(mixed_shards, tmp_path / "report.html")
    keypoints = keypoints_array(mixed_shards.read_index())
    images = re.findall('<img alt="(.).png" src="data:image/jpeg;base64,(.*?)"', page)
    assert len(images) == 4 * 2 + 2
    for name, encoded in images:
        drawn = np.asarray(Image.open(io.BytesIO(base64.b64decode(encoded))), np.int64)
        for joint, (x, y, score) in enumerate(keypoints[int(name)]):
            color = np.array(JOINT_COLORS[joint])
            if score:
                seen = drawn[int(y * 256 / 96), int(x * 256 / 96)]
                assert np.abs(seen - color).max() < 90, (name, joint)
        assert np.abs(drawn[:, -40:] - GREY).max() < 10
        # The ears would be the last two, below the rest.
        assert (np.abs(drawn[-55:] - GREY).max() < 10) == (not keypoints[int(name), 17, 2])


def test_an_intact_set(drawn_shards: ShardSet, capsys: pytest.CaptureFixture[str]) -> None:
    code, out = verify(drawn_shards.root, capsys)
    assert code == 0
    assert out.startswith(f"{len(drawn_shards.manifest.shards)} shards and 3 tables, ")
    assert out.endswith(" MB: every byte is as it was written\n")


@pytest.mark.parametrize("offset", [0, 40, 120, 150])
def test_flipped_byte_in_a_header(
    copied: Path, capsys: pytest.CaptureFixture[str], offset: int
) -> None:
    row = rows_of(copied)[4]
    flip(copied / row["shard"], row["pose_offset"] - 512 + offset)
    code, out = verify(copied, capsys)
    assert code == 1
    assert f"{row['shard']}: its sha256 is" in out
    assert f"{row['shard']}: sample {row['key']}: the tar header of {row['key']}.pose.png" in out
    assert len(out.splitlines()) == 3


@pytest.mark.parametrize(
    ("member", "offset", "what"),
    [
        ("image", 0, "{key}.jpg cannot be decoded (not_an_image"),
        ("image", 200, "{key}.jpg cannot be decoded ("),
        ("pose", 18, "{key}.pose.png cannot be decoded ("),
        ("pose", 60, "{key}.pose.png cannot be decoded ("),
        ("json", 0, "{key}.json is no record in JSON"),
        ("json", 8, "{key}.json differs from the index in key"),
        ("json", -12, "{key}.json differs from the index in keypoints"),
    ],
)
def test_flipped_byte_in_a_member(
    copied: Path, capsys: pytest.CaptureFixture[str], member: str, offset: int, what: str
) -> None:
    row = next(row for row in rows_of(copied) if row["split"] == "train")
    start, size = row[f"{member}_offset"], row[f"{member}_size"]
    flip(copied / row["shard"], start + offset % size)
    code, out = verify(copied, capsys)
    assert code == 1
    first, second, summary = out.splitlines()
    assert first.startswith(f"{row['shard']}: its sha256 is ")
    assert second.startswith(f"{row['shard']}: sample {row['key']}: {what.format(**row)}")
    assert summary == (
        f"1 of {num_shards(copied)} shards and 3 tables are damaged; copy them again, or remove "
        "the folder and build the shards again"
    )


def test_the_page_of_a_set_without_images(copied: Path, tmp_path: Path) -> None:
    rejects = open_shards(str(copied)).read_rejects().slice(0, 0)
    row = {"path": "a", "name": "a", "stage": "shards", "reason": "truncated", "detail": ""}
    lost = pa.Table.from_pylist([row | {"is_stored": False}], rejects.schema)
    tables = {"index": INDEX_SCHEMA.empty_table(), "pairs": PAIRS_SCHEMA.empty_table()}
    for name, table in (tables | {"rejects": lost}).items():
        pq.write_table(table, copied / f"{name}.parquet")
    manifest = json.loads((copied / "manifest.json").read_text())
    manifest |= {"counts": {}, "rejects": {"truncated": 1}}
    (copied / "manifest.json").write_text(json.dumps(manifest))
    assert main([str(copied), "--out", str(tmp_path / "page.html")]) == 0
    assert "truncated: 1 of 1" in (tmp_path / "page.html").read_text()


def test_flipped_byte_that_no_sample_shows(
    copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = next(row for row in rows_of(copied) if row["split"] == "train")
    density = 14  # in the JFIF header: another value is as good an image
    flip(copied / row["shard"], row["image_offset"] + density)
    code, out = verify(copied, capsys)
    assert code == 1
    assert f"{row['shard']}: no sample can be named: all can be decoded" in out


@pytest.mark.parametrize("table", ["index.parquet", "pairs.parquet", "rejects.parquet"])
def test_flipped_byte_in_a_table(
    copied: Path, capsys: pytest.CaptureFixture[str], table: str
) -> None:
    flip(copied / table, 20)
    shard = open_shards(str(copied)).manifest.shards[0].name
    flip(copied / shard, 600)
    code, out = verify(copied, capsys)
    assert code == 1
    assert out.startswith(f"{table}: its sha256 is ")
    assert f"{shard}: its sha256 is " in out
    # Without an index nobody knows where the samples lie.
    assert (f"{shard}: sample" in out) == (table != "index.parquet")


def test_flipped_byte_between_members_and_at_the_end(
    copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [row for row in rows_of(copied) if row["split"] == "train"]
    flip(copied / rows[0]["shard"], rows[0]["json_offset"] + rows[0]["json_size"])
    _, out = verify(copied, capsys)
    assert f"sample {rows[1]['key']}: there is something between {rows[1]['key']}.jpg and" in out
    flip(copied / rows[0]["shard"], (copied / rows[0]["shard"]).stat().st_size - 1)
    _, out = verify(copied, capsys)
    assert f"{rows[0]['shard']}: there is more behind the last sample" in out


def test_truncated_and_missing_shards(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = rows_of(copied)
    first, last = copied / rows[0]["shard"], copied / rows[-1]["shard"]
    first.write_bytes(first.read_bytes()[: rows[1]["image_offset"] + 10])
    last.unlink()
    code, out = verify(copied, capsys)
    assert code == 1
    assert f"{first.name}: has {rows[1]['image_offset'] + 10:,} bytes, by the manifest " in out
    lost = f"sample {rows[1]['key']}: the file ends before the end of {rows[1]['key']}.png"
    assert f"{first.name}: {lost}; what follows is lost" in out
    assert f"{last.name}: is missing" in out
    assert len(out.splitlines()) == 4


def test_shifted_bytes_are_not_listed_a_thousand_times(
    copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shard = copied / rows_of(copied)[0]["shard"]
    shard.write_bytes(b"x" + shard.read_bytes())
    code, out = verify(copied, capsys)
    assert code == 1
    assert "more problems like these" in out
    assert len(out.splitlines()) == 13


def test_index_of_other_shards(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An index whose own hash is right, but which places samples elsewhere."""
    index = pq.read_table(copied / "index.parquet")
    row = index.slice(0, 1).to_pylist()[0]
    for column, value in (("image_size", row["image_size"] + 1), ("pose_offset", 700)):
        place = index.schema.get_field_index(column)
        values = pa.array([value, *index[column].to_pylist()[1:]], pa.int64())
        index = index.set_column(place, index.schema.field(place), values)
    replace_index(copied, index.slice(0, index.num_rows - 1))
    code, out = verify(copied, capsys)
    key = row["key"]
    assert code == 1
    assert f"{key}.png of {row['image_size']:,} bytes lies in the place of {key}.png" in out
    assert f"{key}.pose.png lies, by the index, inside the member before it" in out
    assert re.search(r"holds (\d+) images by the index, (?!\1)\d+ by the manifest", out)


def test_no_page_of_what_is_not_whole(copied: Path, tmp_path: Path) -> None:
    flip(copied / rows_of(copied)[0]["shard"], 3)
    assert main([str(copied), "--verify", "--out", str(tmp_path / "report.html")]) == 1
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda root: shutil.rmtree(root), "not a shard set, or its job has not finished"),
        (lambda root: (root / "manifest.json").unlink(), r"holds no manifest\.json.*build_shards"),
        (lambda root: flip(root / "manifest.json", 0), r"manifest\.json: not JSON"),
        (lambda root: (root / "manifest.json").write_bytes(b"\xff\xfe\xff"), "not JSON"),
        (lambda root: (root / "train-000000.tar").unlink(), r"1 files.*: train-000000\.tar; copy"),
        (lambda root: (root / "pairs.parquet").unlink(), r"1 files.*: pairs\.parquet; copy"),
        (lambda root: flip(root / "index.parquet", -1), r"--verify tells if a file is damaged"),
        (lambda root: cut_images(root), r"image of sample .* is damaged.*--verify"),
    ],
)
def test_bad_input(
    copied: Path,
    caplog: pytest.LogCaptureFixture,
    spoil: Callable[[Path], object],
    message: str,
) -> None:
    spoil(copied)
    assert main([str(copied), "--out", str(copied.parent / "report.html")]) == 2
    assert re.search(message, caplog.text)
    assert not (copied.parent / "report.html").exists()


def test_wrong_usage(
    drawn_shards: ShardSet, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for words in ([], ["--out", "x.html", "--pairs", "-1"]):
        with pytest.raises(SystemExit, match="2"):
            main([drawn_shards.root, *words])
    out = str(tmp_path / "report.html")
    assert main([drawn_shards.root, "--out", out, "--split", "val"]) == 2
    assert "no split 'val'; there are test, train" in caplog.text
    assert main(["nosuch://shards", "--out", out]) == 2
    assert "nosuch" in caplog.text
    manifest = Path(drawn_shards.path("manifest.json"))
    assert main([str(manifest), "--verify"]) == 2
    assert f"{manifest} holds no manifest.json" in caplog.text
    (tmp_path / "file").touch()
    assert main([drawn_shards.root, "--out", str(tmp_path / "file" / "report.html")]) == 2
    assert "report.html could not be written: " in caplog.text


def test_server_without_byte_ranges(
    drawn_shards: ShardSet, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    with serve(drawn_shards.root) as url:
        assert verify(url, capsys)[0] == 0
        assert main([url, "--out", "report.html"]) == 2
    assert "its server does not support byte ranges" in caplog.text


def rows_of(root: Path) -> list[dict]:
    return open_shards(str(root)).read_index().to_pylist()


def num_shards(root: Path) -> int:
    return len(open_shards(str(root)).manifest.shards)


def cut_images(root: Path) -> None:
    """Overwrite the start of every image."""
    for row in rows_of(root):
        flip(root / row["shard"], row["image_offset"])


def replace_index(root: Path, index: pa.Table) -> None:
    """Write another index and enter it in the manifest."""
    path = root / "index.parquet"
    pq.write_table(index, path)
    manifest = json.loads((root / "manifest.json").read_text())
    entry = next(table for table in manifest["tables"] if table["name"] == path.name)
    entry |= {
        "num_rows": index.num_rows,
        "size_bytes": path.stat().st_size,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
    }
    (root / "manifest.json").write_text(json.dumps(manifest))


@contextmanager
def serve(folder: str) -> Iterator[str]:
    """Serve a folder by Python's own HTTP server."""
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
