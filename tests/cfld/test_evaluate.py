"""The evaluation of folders: names, bad input, equal folders, reports, the cache."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from PIL import Image
from playwright.sync_api import sync_playwright
from skimage.metrics import peak_signal_noise_ratio

from cfld.evaluate import main
from cfld.evaluation.metric_networks import load_metric_networks
from cfld.evaluation.paper_tables import GROUND_TRUTH, TABLE_2_256, TABLE_5, compare, markdown_table
from cfld.evaluation.photo_source import SourceError, open_photos
from cfld.evaluation.result_files import KNOWN_PATTERNS, Panel, ResultError, find_results
from cfld.evaluation.scoring import (
    ImagePair,
    bootstrap_interval,
    protocol_images,
    protocol_target,
    reference_statistics,
    score,
)
from cfld.metrics import PAIR_METRICS, pair_metrics

SIZE = (128, 64)
NAMES = (
    "fashionMENDenimid0000008001_1front",
    "fashionMENDenimid0000008001_2side",
    "c_2_d",
    "anna_3",
)
PAIRS = [(a, b) for a in NAMES for b in NAMES if a != b]


def photo(name: str, size: tuple[int, int]) -> Image.Image:
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")
    coarse = np.random.default_rng(seed).integers(0, 256, (7, 5, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((size[1], size[0]), Image.Resampling.BICUBIC)


def resized(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Pillow's bicubic, across then down, whatever the version."""
    across = image.resize((size[1], image.height), Image.Resampling.BICUBIC)
    return across.resize((size[1], size[0]), Image.Resampling.BICUBIC)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    (folder / "sub").mkdir(parents=True)
    for i, name in enumerate(NAMES):
        photo(name, (300, 200)).save(folder / ("sub" if i % 2 else ".") / f"{name}.png")
    return folder


@pytest.fixture
def pairs_csv(tmp_path: Path) -> Path:
    path = tmp_path / "pairs.csv"
    path.write_text("from,to\n" + "".join(f"{a}.jpg,{b}.jpg\n" for a, b in PAIRS))
    return path


@pytest.fixture
def shards(tmp_path: Path, write_shards: Callable[..., Path]) -> Path:
    """A shard set of the same photos; one is not of the split."""
    splits = dict.fromkeys(NAMES, "test") | {"trained": "train"}
    photos = {
        name: (photo(name, (300, 200)), np.zeros((18, 3)), split) for name, split in splits.items()
    }
    return write_shards(tmp_path / "shards", photos, PAIRS)


def make_results(
    folder: Path, pattern: str, extension: str = "png", noise: float = 0.0, num: int = len(PAIRS)
) -> Path:
    """Results for all pairs: the targets themselves at the protocol's size, plus noise."""
    folder.mkdir()
    generator = np.random.default_rng(0)
    for source, target in PAIRS[:num]:
        pixels = np.asarray(resized(photo(target, (300, 200)), SIZE))
        noisy = pixels + noise * generator.normal(size=pixels.shape)
        image = Image.fromarray(noisy.clip(0, 255).astype(np.uint8))
        image.save(folder / f"{pattern.format(source=source, target=target)}.{extension}")
    return folder


def run(folder: Path, targets: Path, *more: object) -> int:
    output = folder.parent / "scores"
    size = [str(each) for each in SIZE]
    return main(
        ["--generated", str(folder), "--targets", str(targets), "--output", str(output),
         "--cache", str(folder.parent / "cache"), "--device", "cpu", "--size", *size,
         *map(str, more)]
    )  # fmt: skip


def read_metrics(folder: Path) -> dict:
    return json.loads((folder.parent / "scores" / "metrics.json").read_text())


def test_equal_folders_have_perfect_scores(
    tmp_path: Path, photos: Path, metric_weights: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = make_results(tmp_path / "ours", "{source}_2_{target}", num=4)
    shared = ["--metric-weights", metric_weights, "--reference", results]
    shared += ["--metrics", *PAIR_METRICS, "lpips", "fid_paper"]
    assert run(results, photos, *shared) == 0
    document = read_metrics(results)
    values = {name: each["value"] for name, each in document["scores"].items()}
    assert values.pop("psnr") == "inf"
    assert values.pop("lpips") == 0
    assert values.pop("fid_paper") == pytest.approx(0, abs=1e-6)
    assert values == {"ssim_paper": 1.0, "ssim_256": 1.0, "ssim": 1.0}
    assert document["unavailable"] == {}
    assert document["num_images"] == 4
    assert "| lpips | 0.0000 |" in capsys.readouterr().out


def test_scores_equal_those_of_the_images(tmp_path: Path, photos: Path, pairs_csv: Path) -> None:
    results = make_results(tmp_path / "ours", "{source}_2_{target}", noise=20)
    assert run(results, photos, "--pairs", pairs_csv, "--metrics", "psnr", "lpips") == 0
    table = pq.read_table(tmp_path / "scores" / "scores.parquet").to_pylist()
    assert {row["name"] for row in table} == {f"{a}_2_{b}" for a, b in PAIRS}
    for row in table:
        generated = np.asarray(Image.open(results / f"{row['name']}.png"))
        target = next(b for a, b in PAIRS if f"{a}_2_{b}" == row["name"])
        expected = np.asarray(resized(photo(target, (300, 200)), SIZE))
        assert row["psnr"] == pytest.approx(peak_signal_noise_ratio(expected, generated), abs=1e-5)
    document = read_metrics(results)
    mean = document["scores"]["psnr"]
    assert mean["value"] == pytest.approx(np.mean([row["psnr"] for row in table]))
    assert mean["low"] < mean["value"] < mean["high"]
    assert "alexnet" in document["unavailable"]["lpips"]


@pytest.mark.parametrize("pattern", KNOWN_PATTERNS)
@pytest.mark.parametrize("extension", ["png", "jpg"])
def test_known_names_are_recognised(
    tmp_path: Path, photos: Path, pairs_csv: Path, pattern: str, extension: str
) -> None:
    results = make_results(tmp_path / "theirs", pattern, extension)
    found = find_results(results, open_photos(str(photos), pairs_csv=pairs_csv))
    assert found.pattern == pattern
    assert set(found.files) == set(PAIRS)
    assert found.missing == found.surplus == ()


def test_names_with_extensions_inside_and_a_given_pattern(tmp_path: Path, photos: Path) -> None:
    results = make_results(tmp_path / "theirs", "{source}.jpg___{target}.jpg_vis")
    assert set(find_results(results, open_photos(str(photos))).files) == set(PAIRS)
    other = make_results(tmp_path / "other", "x-{source}+{target}-y")
    with pytest.raises(ResultError, match="describe the names with --pattern"):
        find_results(other, open_photos(str(photos)))
    found = find_results(other, open_photos(str(photos)), "x-{source}+{target}-y.png")
    assert set(found.files) == set(PAIRS)


def test_shards_and_folder_give_the_same_targets(
    photos: Path, shards: Path, pairs_csv: Path
) -> None:
    folder = open_photos(str(photos), pairs_csv=pairs_csv)
    stored = open_photos(str(shards), "test")
    assert set(folder.pairs or ()) == set(stored.pairs or ())
    for name in NAMES:
        assert folder.read(name) == stored.read(name)
    assert stored.note is None
    assert "trained" not in stored.places
    assert "trained" in open_photos(str(shards)).places


def test_no_more_of_a_remote_shard_is_read_than_a_photo(shards: Path) -> None:
    class Remote(MemoryFileSystem):
        store: ClassVar[dict] = {}
        ranges: ClassVar[list[tuple[int, int]]] = []

        def open(self, path, mode="rb", **_options):
            raise AssertionError(f"{path} is opened ({mode}), and read ahead")

        def cat_file(self, path, start=None, end=None):
            self.ranges.append((start, end))
            return Path(path).read_bytes()[start:end]

    source = open_photos(str(shards), "test")
    fs = Remote(skip_instance_cache=True)
    assert replace(source, fs=fs).read(NAMES[0]) == source.read(NAMES[0])
    place = source.places[NAMES[0]]
    assert fs.ranges == [(place.offset, place.offset + len(source.read(NAMES[0])))]


def test_photos_resized_by_the_shards_are_mentioned(shards: Path) -> None:
    tar = shards / "test-000000.tar"
    tar.write_bytes(tar.read_bytes().replace(b'"photo_height": 300', b'"photo_height": 999'))
    note = open_photos(str(shards), "test").note
    assert note is not None
    assert "300x200, not as the originals" in note


def test_targets_are_resized_as_pillow_does(photos: Path) -> None:
    name = NAMES[0]
    expected = resized(photo(name, (300, 200)), (256, 176))
    target = protocol_target(open_photos(str(photos)), name, (256, 176))
    assert (target == np.asarray(expected)).all()


def test_generated_images_are_truncated_after_an_antialiased_resize() -> None:
    images = torch.rand((2, 3, 512, 512), generator=torch.Generator().manual_seed(0)) * 1.2 - 0.1
    resized = torch.nn.functional.interpolate(images, (256, 176), mode="bicubic", antialias=True)
    expected = (resized.numpy() * np.float32(255)).clip(0, 255).astype(np.uint8)
    assert (protocol_images(images, (256, 176)).numpy() == expected).all()
    assert protocol_images(torch.full((1, 3, 8, 8), 0.999), (8, 8)).unique().tolist() == [254]


def test_images_kept_at_the_models_size_score_as_those_resized_at_once() -> None:
    generator = torch.Generator().manual_seed(0)
    images, targets = torch.rand((2, 3, 512, 512), generator=generator).split(1)
    kept = (images * 255).round() / 255
    for size in ((256, 176), (512, 352)):
        at_once, later = (protocol_images(each, size).float() for each in (images, kept))
        assert (at_once - later).abs().max() <= 1
        target = protocol_images(targets, size).float() / 255
        scores = [pair_metrics(each / 255, target) for each in (at_once, later)]
        assert scores[0]["psnr"].item() == pytest.approx(scores[1]["psnr"].item(), abs=2e-3)
        for name in ("ssim_paper", "ssim_256", "ssim"):
            assert scores[0][name].item() == pytest.approx(scores[1][name].item(), abs=3e-4)


def test_nan_images_are_refused() -> None:
    images = torch.zeros(3, 3, 8, 8)
    images[1, 0, 2, 2] = torch.nan
    with pytest.raises(ValueError, match=r"images \[1\] of the batch hold NaN"):
        protocol_images(images, (8, 8))


def refused(caplog: pytest.LogCaptureFixture, folder: Path, *arguments: object) -> str:
    assert run(folder, *arguments) == 2
    assert not (folder.parent / "scores").exists()
    return caplog.text


def test_missing_and_surplus_images(
    tmp_path: Path, shards: Path, caplog: pytest.LogCaptureFixture
) -> None:
    results = make_results(tmp_path / "ours", "{source}_2_{target}", noise=10)
    (results / "c_2_d_2_anna_3.png").rename(results / "c_2_d_2_nobody.png")
    text = refused(caplog, results, shards, "--metrics", "psnr")
    assert "1 are missing; --allow-missing scores the others:\n  c_2_d_2_anna_3" in text
    assert "1 fit no pair; --allow-missing scores the others:\n  c_2_d_2_nobody.png" in text
    assert run(results, shards, "--metrics", "psnr", "--allow-missing") == 0
    document = read_metrics(results)
    assert document["num_images"] == len(PAIRS) - 1
    assert document["missing_images"] == ["c_2_d_2_anna_3"]
    assert document["surplus_images"] == ["c_2_d_2_nobody.png"]
    html = (tmp_path / "scores" / "report.html").read_text()
    assert "1 images are expected, but missing: c_2_d_2_anna_3." in html


def test_wrong_sizes(tmp_path: Path, shards: Path, caplog: pytest.LogCaptureFixture) -> None:
    results = make_results(tmp_path / "ours", "{source}_2_{target}", noise=10)
    odd = results / "anna_3_2_c_2_d.png"
    Image.open(odd).resize((128, 128)).save(odd)
    text = refused(caplog, results, shards, "--metrics", "psnr")
    assert "1 are strips of 2 images; --panel 2/2 takes the last:\n  anna_3_2_c_2_d.png" in text
    caplog.clear()
    Image.open(odd).resize((100, 90)).save(odd)
    text = refused(caplog, results, shards, "--metrics", "psnr")
    assert "1 are 90x100, not 128x64; --resize brings them there:\n  anna_3_2_c_2_d.png" in text
    assert run(results, shards, "--metrics", "psnr", "--resize") == 0
    assert "1 generated images were resized from [(90, 100)]" in read_metrics(results)["notes"][-1]


def test_strips(tmp_path: Path, shards: Path) -> None:
    results = make_results(tmp_path / "ours", "{source}___{target}_vis")
    for path in results.iterdir():
        strip = np.zeros((128, 5 * 64, 3), np.uint8)
        strip[:, 4 * 64 :] = np.asarray(Image.open(path))
        Image.fromarray(strip).save(path)
    assert run(results, shards, "--metrics", "ssim", "--panel", "5/5") == 0
    assert read_metrics(results)["scores"]["ssim"]["value"] == 1.0
    with pytest.raises(ValueError, match="'6/5' is no panel; give K/N"):
        Panel.parse("6/5")


def test_alpha_greyscale_and_unreadable(
    tmp_path: Path, shards: Path, caplog: pytest.LogCaptureFixture
) -> None:
    results = make_results(tmp_path / "ours", "{source}_2_{target}", noise=10)
    files = sorted(results.iterdir())
    Image.open(files[0]).convert("L").save(files[0])
    Image.open(files[1]).convert("RGBA").save(files[1])
    assert run(results, shards, "--metrics", "psnr") == 0
    notes = " ".join(read_metrics(results)["notes"])
    assert "1 generated images are greyscale; taken as RGB" in notes
    assert "1 generated images are RGB with an opaque alpha channel; taken as RGB" in notes
    glass = Image.open(files[2]).convert("RGBA")
    glass.putpixel((3, 3), (0, 0, 0, 0))
    glass.save(files[2])
    files[3].write_bytes(files[3].read_bytes()[:2000])
    caplog.clear()
    assert run(results, shards, "--metrics", "psnr") == 2
    assert (
        f"1 have transparent pixels; lay them over a background:\n  {files[2].name}" in caplog.text
    )
    assert f"1 are no readable images:\n  {files[3].name}" in caplog.text


def test_duplicate_names(tmp_path: Path, photos: Path, caplog: pytest.LogCaptureFixture) -> None:
    results = make_results(tmp_path / "ours", "{source}_2_{target}")
    Image.open(results / "anna_3_2_c_2_d.png").save(results / "anna_3_2_c_2_d.jpg")
    text = refused(caplog, results, photos)
    assert "1 pairs have more than one file" in text
    photo(NAMES[0], (30, 20)).save(photos / "sub" / f"{NAMES[0]}.jpg")
    with pytest.raises(SourceError, match="1 names occur more than once"):
        open_photos(str(photos))


def test_ambiguous_names_are_cut_by_the_known_pairs(tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    results = tmp_path / "results"
    photos.mkdir()
    results.mkdir()
    for name in ("a", "a_2_b", "b_2_c", "c"):
        photo(name, SIZE).save(photos / f"{name}.png")
    photo("x", SIZE).save(results / "a_2_b_2_c.png")
    with pytest.raises(ResultError, match="may be any of the pairs"):
        find_results(results, open_photos(str(photos)))
    listed = tmp_path / "pairs.csv"
    listed.write_text("from,to\na.jpg,b_2_c.jpg\na_2_b.jpg,b_2_c.jpg\n")
    found = find_results(results, open_photos(str(photos), pairs_csv=listed))
    assert list(found.files) == [("a", "b_2_c")]


def test_one_image_has_no_fid(
    tmp_path: Path, photos: Path, caplog: pytest.LogCaptureFixture
) -> None:
    results = make_results(tmp_path / "ours", "{source}_2_{target}")
    for path in sorted(results.iterdir())[1:]:
        path.unlink()
    assert "FID needs at least 2 generated images" in refused(
        caplog, results, photos, "--reference", photos
    )
    assert run(results, photos, "--metrics", "psnr", "--reference", photos) == 0


def test_bad_sources(tmp_path: Path, photos: Path, shards: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(SourceError, match="is no folder"):
        open_photos(str(tmp_path / "nowhere"))
    with pytest.raises(SourceError, match="holds no image"):
        open_photos(str(tmp_path / "empty"))
    with pytest.raises(ResultError, match="holds no image"):
        find_results(tmp_path / "empty", open_photos(str(photos)))
    with pytest.raises(ResultError, match=r"pattern '\{source\}' needs"):
        find_results(photos, open_photos(str(photos)), "{source}")
    with pytest.raises(SourceError, match=r"no split 'val'; it has \['test', 'train'\]"):
        open_photos(str(shards), "val")
    listed = tmp_path / "pairs.csv"
    listed.write_text("from,to\nx.jpg,y.jpg\n")
    with pytest.raises(SourceError, match=r"1 targets are not in .*, such as \['y.jpg'\]"):
        open_photos(str(photos), pairs_csv=listed)
    listed.write_text("source,target\n")
    with pytest.raises(SourceError, match="the columns 'from' and 'to'"):
        open_photos(str(photos), pairs_csv=listed)
    (shards / "pairs.parquet").unlink()
    with pytest.raises(SourceError, match="missing beside its manifest"):
        open_photos(str(shards))
    (shards / "manifest.json").write_text('{"format": "other", "version": 1}')
    with pytest.raises(SourceError, match="this reader needs"):
        open_photos(str(shards))
    (photos / f"{NAMES[0]}.png").write_bytes(b"x")
    with pytest.raises(SourceError, match=r"photo fashionMEN.* not_an_image"):
        protocol_target(open_photos(str(photos)), NAMES[0], SIZE)


def test_nothing_to_score() -> None:
    with pytest.raises(ValueError, match="no pair to score"):
        score([], load_metric_networks([]))


def test_undefined_scores_are_left_out_and_named() -> None:
    flat = np.full((*SIZE, 3), 100, np.uint8)
    textured = np.asarray(photo("x", SIZE))
    scores = score(
        [ImagePair("flat", flat, textured), ImagePair("fine", textured, textured)],
        load_metric_networks([]),
        PAIR_METRICS,
    )
    assert scores.undefined("ssim_256") == ("flat",)
    assert scores.intervals["ssim_256"].value == 1.0
    assert scores.intervals is scores.intervals  # resampled once


def test_reference_statistics_are_cached_by_what_they_came_from(
    tmp_path: Path, photos: Path, metric_weights: Path
) -> None:
    networks = load_metric_networks(["fid"], metric_weights)
    cache = tmp_path / "cache"
    first = reference_statistics(open_photos(str(photos)), SIZE, networks, cache)["fid"]
    assert first.count == len(NAMES)
    (entry,) = cache.iterdir()
    written = entry.stat().st_mtime_ns
    again = reference_statistics(open_photos(str(photos)), SIZE, networks, cache)["fid"]
    assert (again.scatter == first.scatter).all()
    assert entry.stat().st_mtime_ns == written
    photo("new", (50, 40)).save(photos / "new.png")
    other = reference_statistics(open_photos(str(photos)), SIZE, networks, cache)["fid"]
    assert other.count == len(NAMES) + 1
    assert len(list(cache.iterdir())) == 2


def test_bootstrap_interval_covers_the_mean() -> None:
    generator = np.random.default_rng(0)
    covered = 0
    for seed in range(100):
        interval = bootstrap_interval(generator.normal(5, 2, 60), 300, seed)
        assert interval.low is not None
        assert interval.high is not None
        covered += interval.low < 5 < interval.high
    assert 88 <= covered <= 99
    assert bootstrap_interval(np.array([np.inf, 1.0]), 10, 0).low is None


def test_tables_hold_ours_beside_the_papers() -> None:
    ours = {GROUND_TRUTH: {"fid_paper": 7.9, "psnr": np.inf}, "X": {"lpips": 0.5}}
    text = markdown_table(*compare(TABLE_2_256, ours))
    assert "| CFLD | 6.804 |  | 0.1519 |  | 0.7378 |  | 18.235 |  |" in text
    assert "| Ground truth | 7.847 | 7.900 | 0.0000 |  | 1.0000 |  | ∞ | ∞ |" in text
    assert text.endswith("| X |  |  |  | 0.5000 |  |  |  |  |\n")
    assert len(compare(TABLE_5, {})[1]) == 5


def test_report_opens_in_a_browser(
    tmp_path: Path, shards: Path, chromium: str, metric_weights: Path
) -> None:
    results = make_results(tmp_path / "ours", "{source}_2_{target}", noise=15)
    assert (
        run(results, shards, "--metric-weights", metric_weights, "--metrics", "psnr", "lpips") == 0
    )
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page()
        requests: list[str] = []
        page.on("request", lambda request: requests.append(request.url))
        page.goto((tmp_path / "scores" / "report.html").as_uri())
        assert page.title() == "Scores of ours"
        assert page.locator("h2").all_inner_texts()[1:4] == [
            f"{each} pairs by lpips (source, target, generated)"
            for each in ("Best", "Median", "Worst")
        ]
        assert page.locator("figure").count() == 12
        assert page.evaluate("[...document.images].every(image => image.naturalWidth === 64)")
        browser.close()
    assert [url for url in requests if not url.startswith(("file:", "data:"))] == []
