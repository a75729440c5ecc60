"""The command from photos to a shard set, and the set as other people's readers see it."""

import hashlib
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import webdataset
from PIL import Image

from cfld import pose
from cfld.images import decode_image, resize_image
from preprocessing.build_shards import main
from preprocessing.datasets import DATASETS
from preprocessing.listing import Dataset, Photo
from preprocessing.listing_stage import list_dataset, select_photos
from preprocessing.shard_stage import scale_keypoints
from shards.format import NUM_JOINTS, POSE_SIZE, SAMPLE_FIELDS, ShardSet, keypoints_array
from tests.keypoint_files import write_openpose_json, write_patn_csv

STANDING = np.array(
    [[88, 40], [88, 60], [70, 62], [64, 90], [60, 120], [106, 62], [112, 90], [116, 120],
     [76, 130], [75, 180], [74, 230], [100, 130], [101, 180], [102, 230],
     [84, 36], [92, 36], [80, 38], [96, 38]]
)  # fmt: skip


AsNobody = Callable[[], AbstractContextManager[None]]


def keypoints_of(points: np.ndarray, *missing: int) -> np.ndarray:
    keypoints = np.concatenate([points, np.ones((18, 1))], axis=1).astype(np.float32)
    keypoints[list(missing)] = (np.nan, np.nan, 0)
    return keypoints


def write_photo(path: Path, seed: int, size: tuple[int, int] = (110, 75)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    small = np.random.default_rng(seed).integers(0, 256, (6, 4, 3), np.uint8)
    Image.fromarray(small).resize(size[::-1], Image.Resampling.BICUBIC).save(path, quality=95)


def rows_of(shards: ShardSet) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = shards.read_index().to_pylist()
    return rows


def reasons_of(shards: ShardSet) -> dict[str | None, str]:
    return {row["name"]: row["reason"] for row in shards.read_rejects().to_pylist()}


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def strangers_reader(folder: Path) -> Iterator[tuple[dict[str, Any], dict[str, bytes]]]:
    """A reader written from shards/README.md alone: tarfile, json and pyarrow."""
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["format"] == "cfld-shards"
    assert manifest["version"] == 1
    index = pq.read_table(folder / "index.parquet").to_pylist()
    for shard in manifest["shards"]:
        data = (folder / shard["name"]).read_bytes()
        assert len(data) == shard["size_bytes"]
        assert hashlib.sha256(data).hexdigest() == shard["sha256"]
        rows = [row for row in index if row["shard"] == shard["name"]]
        assert len(rows) == shard["num_images"]
        with tarfile.open(folder / shard["name"]) as tar:
            members = iter(tar.getmembers())
            for row in rows:
                contents = {}
                names = {"image": row["image_extension"], "pose": "pose.png", "json": "json"}
                for member, extension in names.items():
                    info = next(members)
                    assert info.name == f"{row['key']}.{extension}"
                    assert info.offset_data == row[f"{member}_offset"]
                    assert info.size == row[f"{member}_size"]
                    contents[member] = tar.extractfile(info).read()
                yield row, contents
            assert next(members, None) is None


def test_a_stranger_reads_everything_from_the_documentation(drawn_shards: ShardSet) -> None:
    samples = list(strangers_reader(Path(drawn_shards.root)))
    assert [row for row, _ in samples] == [
        row | {"keypoints": pytest.approx(row["keypoints"], nan_ok=True)}
        for row in rows_of(drawn_shards)
    ]
    assert len({row["shard"] for row, _ in samples}) > 3
    for row, contents in samples:
        record = json.loads(contents["json"])
        assert tuple(record) == SAMPLE_FIELDS
        shared = record.keys() & row.keys() - {"keypoints"}
        assert {name: record[name] for name in shared} == {name: row[name] for name in shared}
        keypoints = np.array(record["keypoints"], np.float32)  # null becomes NaN
        np.testing.assert_array_equal(keypoints.ravel(), np.float32(row["keypoints"]))
        image = Image.open(io.BytesIO(contents["image"]))
        assert (image.height, image.width) == (row["height"], row["width"])
        skeleton = np.asarray(Image.open(io.BytesIO(contents["pose"])))
        expected = pose.draw_skeleton(keypoints, (row["height"], row["width"]))
        np.testing.assert_array_equal(skeleton, expected)


def test_plain_webdataset_streams_the_shards(drawn_shards: ShardSet) -> None:
    number = sum(shard.split == "train" for shard in drawn_shards.manifest.shards)
    url = f"{drawn_shards.root}/train-{{000000..{number - 1:06d}}}.tar"
    samples = list(webdataset.WebDataset(url, shardshuffle=False).decode("rgb8"))
    rows = [row for row in rows_of(drawn_shards) if row["split"] == "train"]
    assert [sample["__key__"] for sample in samples] == [row["key"] for row in rows]
    for sample, row in zip(samples, rows, strict=True):
        assert sample["jpg"].shape == (row["height"], row["width"], 3)
        assert sample["pose.png"].shape == (256, 256, 3)
        assert sample["json"]["person"] == row["person"]


def test_our_reader_gives_the_same_bytes(drawn_shards: ShardSet) -> None:
    for row, contents in strangers_reader(Path(drawn_shards.root)):
        for member, data in contents.items():
            assert drawn_shards.read_member(row, member) == data


def test_headers_hold_nothing_of_the_machine(drawn_shards: ShardSet) -> None:
    for shard in drawn_shards.manifest.shards:
        path = Path(drawn_shards.path(shard.name))
        assert path.read_bytes()[257:265] == b"ustar\x0000"
        with tarfile.open(path) as tar:
            for info in tar:
                assert (info.mtime, info.uid, info.gid, info.mode) == (0, 0, 0, 0o644)
                assert not info.pax_headers
                assert (info.uname, info.gname) == ("", "")
        overhead = 3 * (512 + 511) * shard.num_images + 1024 + tarfile.RECORDSIZE
        with tarfile.open(path) as tar:
            assert shard.size_bytes <= sum(info.size for info in tar) + overhead


def test_rows_are_sorted_and_pairs_lie_in_one_shard(drawn_shards: ShardSet) -> None:
    rows = rows_of(drawn_shards)
    assert [(r["split"], r["person"], r["name"]) for r in rows] == sorted(
        (r["split"], r["person"], r["name"]) for r in rows
    )
    assert len({row["key"] for row in rows}) == len(rows) == 24
    pairs = drawn_shards.read_pairs().to_pylist()
    assert pairs
    for pair in pairs:
        source, target = rows[pair["source"]], rows[pair["target"]]
        assert source["shard"] == target["shard"]
        assert source["person"] == target["person"]
        assert source["split"] == target["split"] == pair["split"]
        assert source["is_valid"]
        assert source["name"] != target["name"]


def test_manifest_counts_what_is_there(drawn_shards: ShardSet) -> None:
    manifest, rows = drawn_shards.manifest, rows_of(drawn_shards)
    for split, counts in manifest.counts.items():
        of_split = [row for row in rows if row["split"] == split]
        assert counts.images == len(of_split)
        assert counts.persons == len({row["person"] for row in of_split})
        assert counts.valid == sum(row["is_valid"] for row in of_split)
        assert counts.pairs == drawn_shards.read_pairs(split).num_rows
    assert sum(manifest.rejects.values()) == drawn_shards.read_rejects().num_rows
    for table in manifest.tables:
        data = Path(drawn_shards.path(table.name)).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (table.size_bytes, table.sha256)
        assert pq.read_metadata(drawn_shards.path(table.name)).num_rows == table.num_rows
    stored = set(os.listdir(drawn_shards.root))  # noqa: PTH208 - names are all that is needed
    assert stored == {
        "manifest.json", *(t.name for t in manifest.tables), *(s.name for s in manifest.shards)
    }  # fmt: skip


def test_test_photos_are_untouched_and_train_photos_resized(
    drawn_root: Path, drawn_shards: ShardSet
) -> None:
    for row, contents in strangers_reader(Path(drawn_shards.root)):
        photo = (drawn_root / row["name"]).read_bytes()
        if row["split"] == "test":
            assert contents["image"] == photo
            assert row["image_extension"] == "png"
            assert (row["height"], row["width"]) == (64, 48)
        else:
            stored = decode_image(contents["image"]).astype(int)
            expected = resize_image(decode_image(photo), (512, 512))
            assert np.abs(stored - expected).mean() < 2  # what JPEG at quality 95 costs
            assert row["image_extension"] == "jpg"


def test_any_number_of_workers_gives_the_same_bytes(
    drawn_root: Path, drawn_shards: ShardSet, build: Any, tmp_path: Path
) -> None:
    build("synthetic", drawn_root, tmp_path / "a", "--shard-size", "0.05", "--num-workers", 1)
    assert files_of(tmp_path / "a") == files_of(Path(drawn_shards.root))


def test_a_second_run_has_nothing_to_do(
    drawn_root: Path, drawn_shards: ShardSet, capsys: pytest.CaptureFixture[str]
) -> None:
    before = files_of(Path(drawn_shards.root))
    words = ["--dataset", "synthetic", "--root", str(drawn_root), "--output", drawn_shards.root]
    assert main([*words, "--shard-size", "0.05"]) == 0
    assert "complete already" in capsys.readouterr().out
    assert files_of(Path(drawn_shards.root)) == before


@pytest.mark.parametrize(
    ("option", "setting"),
    [
        (["--jpeg-quality", "90"], "jpeg_quality"),
        (["--image-size", "64", "48"], "image_size"),
        (["--shard-size", "1"], "shard_size_bytes"),
        (["--limit", "5"], "limit"),
        (["--splits", "train"], "splits"),
        (["--seed", "1"], "seed"),
    ],
)
def test_other_settings_are_refused_by_name(
    drawn_root: Path,
    drawn_shards: ShardSet,
    option: list[str],
    setting: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    words = ["--dataset", "synthetic", "--root", str(drawn_root), "--output", drawn_shards.root]
    assert main([*words, "--shard-size", "0.05", *option]) == 2
    assert f"made with {setting} =" in caplog.text
    assert "another output folder" in caplog.text


def test_the_summary_says_what_there_is(
    drawn_root: Path, ray_workers: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--dataset", "synthetic", "--root", str(drawn_root), "--output", str(tmp_path / "o")]
    assert main([*words, "--image-size", "32", "24"]) == 0
    summary = capsys.readouterr().out
    assert f"{tmp_path / 'o'} is complete" in summary
    for word in ("images", "persons", "valid", "pairs", "train", "test", "2 shards", "MB"):
        assert word in summary
    assert "seconds: listing" in summary
    assert "shards" in summary.splitlines()[-1]


@pytest.fixture
def deepfashion_root(tmp_path: Path) -> Path:
    """Four train photos of one person, two of another, two test photos; PATN csvs for all."""
    root = tmp_path / "fashion"
    people = {
        "train": ["WOMENDressesid0000000101_1front", "WOMENDressesid0000000101_2side",
                  "WOMENDressesid0000000101_3back", "WOMENDressesid0000000101_4full",
                  "MENDenimid0000000201_1front", "MENDenimid0000000201_2side"],
        "test": ["MENDenimid0000000301_1front", "MENDenimid0000000301_2side"],
    }  # fmt: skip
    for split, names in people.items():
        names = [f"fashion{name}.jpg" for name in names]
        (root / f"{split}.lst").parent.mkdir(exist_ok=True)
        (root / f"{split}.lst").write_text("\n".join(names) + "\n")
        for number, name in enumerate(names):
            write_photo(root / f"{split}_highres" / name, number)
        lost = {2: (8,), 3: range(18)}  # a hip; everything
        keypoints = [keypoints_of(STANDING + n, *lost.get(n, ())) for n in range(len(names))]
        write_patn_csv(
            root / f"fasion-resize-annotation-{split}.csv", zip(names, keypoints, strict=True)
        )
    return root


def test_published_keypoints_are_scaled_from_their_frame(
    deepfashion_root: Path, build: Any, tmp_path: Path
) -> None:
    shards = build("deepfashion", deepfashion_root, tmp_path / "out")
    rows = {row["name"]: (number, row) for number, row in enumerate(rows_of(shards))}
    all_keypoints = keypoints_array(shards.read_index())
    for name, shift in (("MENDenimid0000000301_2side", 1), ("WOMENDressesid0000000101_2side", 1)):
        number, row = rows[f"fashion{name}.jpg"]
        frame, size = (256, 176), (row["height"], row["width"])
        published = keypoints_of(STANDING + shift)
        np.testing.assert_array_equal(
            all_keypoints[number], scale_keypoints(published, frame, size)
        )
        # The authors' whole pixels, not one less, after a float32 in another frame.
        np.testing.assert_array_equal(
            pose.canvas_points(all_keypoints[number], size), pose.canvas_points(published, frame)
        )
    assert reasons_of(shards) == {
        "fashionWOMENDressesid0000000101_3back.jpg": "too_few_joints",
        "fashionWOMENDressesid0000000101_4full.jpg": "no_person",
    }
    counts = shards.manifest.counts["train"]
    assert (counts.images, counts.persons, counts.valid, counts.pairs) == (6, 2, 4, 4)
    assert shards.read_pairs("test").num_rows == 2


@pytest.mark.parametrize("size", [(512, 512), (1101, 750), (256, 176), (128, 64), (333, 517)])
def test_scaled_keypoints_fall_on_the_authors_pixels(size: tuple[int, int]) -> None:
    x, y = np.meshgrid(np.arange(176), np.arange(256))
    points = np.stack([x.ravel(), y.ravel(), np.ones(x.size)], axis=1).astype(np.float32)
    points = points[: len(points) // 18 * 18].reshape(-1, 18, 3)
    stored = scale_keypoints(points, (256, 176), size)
    np.testing.assert_array_equal(
        pose.canvas_points(stored, size), pose.canvas_points(points, (256, 176))
    )


def test_a_published_pair_list_wins(deepfashion_root: Path, build: Any, tmp_path: Path) -> None:
    front, side, back = (
        f"fashionWOMENDressesid0000000101_{view}.jpg" for view in ("1front", "2side", "3back")
    )
    (deepfashion_root / "fasion-resize-pairs-train.csv").write_text(
        f"from,to\n{side},{front}\n{front},{back}\n{front},gone.jpg\n"
    )
    shards = build("deepfashion", deepfashion_root, tmp_path / "out", "--image-size", 64, 48)
    names = shards.read_index(["name"])["name"].to_pylist()
    pairs = [
        (names[p["source"]], names[p["target"]]) for p in shards.read_pairs("train").to_pylist()
    ]
    assert pairs == [(side, front), (front, back)]
    reasons = shards.manifest.rejects
    assert reasons == {"not_in_pair_list": 2, "no_person": 1, "pair_of_missing_image": 1}


def test_files_given_by_hand_win(deepfashion_root: Path, build: Any, tmp_path: Path) -> None:
    poses = tmp_path / "poses"
    poses.mkdir()
    name = "fashionMENDenimid0000000201_1front"
    write_openpose_json(poses / f"{name}_keypoints.json", keypoints_of(STANDING)[None])
    (tmp_path / "pairs.csv").write_text(
        f"from,to\n{name}.jpg,fashionMENDenimid0000000201_2side.jpg\n"
    )
    shards = build(
        "deepfashion", deepfashion_root, tmp_path / "out", "--splits", "train",
        "--keypoints", poses, "--keypoints-frame", 256, 176, "--image-size", "original",
        "--pairs", f"train={tmp_path / 'pairs.csv'}",
    )  # fmt: skip
    rows = {row["name"]: row for row in rows_of(shards)}
    assert {name for name, row in rows.items() if row["is_valid"]} == {f"{name}.jpg"}
    assert rows[f"{name}.jpg"]["num_people"] == 1
    assert (rows[f"{name}.jpg"]["height"], rows[f"{name}.jpg"]["width"]) == (110, 75)
    assert shards.manifest.counts["train"].pairs == 1
    assert shards.manifest.rejects == {"no_keypoints": 4}


def test_limit_takes_whole_persons_by_the_seed(
    drawn_root: Path, build: Any, tmp_path: Path
) -> None:
    options = ["--splits", "train", "--limit", 8, "--image-size", 32, 24]
    by_seed = []
    for seed in (0, 1):
        output = tmp_path / str(seed)
        shards = build("synthetic", drawn_root, output, *options, "--seed", seed)
        by_seed.append({row["person"] for row in rows_of(shards)})
    assert all(len(persons) == 2 for persons in by_seed)
    assert by_seed[0] != by_seed[1]


def test_listed_names_that_were_not_asked_for_are_no_rejects(
    deepfashion_root: Path, build: Any, tmp_path: Path
) -> None:
    shards = build(
        "deepfashion",
        deepfashion_root,
        tmp_path / "out",
        "--splits",
        "test",
        "--image-size",
        32,
        24,
    )
    assert shards.manifest.rejects == {}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--splits", "val"], "--splits val: the splits of this dataset are"),
        (["--image-size", "512"], "--image-size 512: give HEIGHT WIDTH or 'original'"),
        (["--image-size", "0", "5"], r"size \(0, 5\): height and width must be positive"),
        (["--jpeg-quality", "0"], "JPEG quality 0: must lie in 1..100"),
        (["--limit", "0"], "limit 0: at least one photo is needed"),
        (["--num-workers", "0"], "workers 0: at least one is needed"),
        (["--num-workers", "-1"], "workers -1: at least one is needed"),
        (["--shard-size", "nan"], "--shard-size nan: must be a positive number of megabytes"),
        (["--shard-size", "inf"], "--shard-size inf: must be a positive number of megabytes"),
        (["--shard-size", "-5"], "--shard-size -5.0: must be a positive number of megabytes"),
        (
            ["--pairs", f"trian={__file__}"],
            "--pairs trian=…: there are photos of ['test', 'train']",
        ),
        (["--pairs", "train"], "--pairs train: give SPLIT=FILE, each split once"),
        (["--pairs", "train=nowhere.csv"], "nowhere.csv: there is no such file"),
        (["--keypoints", "nowhere.csv"], "nowhere.csv: there is no such file"),
        (["--keypoints", __file__], "neither a csv with the header"),
        (["--dataset", "deepfashion"], "missing"),
        (["--root", "/nowhere"], "/nowhere"),
        (
            ["--root", "nowhere://photos"],
            "nowhere://photos: cannot be reached (ValueError: Protocol",
        ),
        (["--output", "nowhere://out"], "nowhere://out: cannot be reached (ValueError: Protocol"),
    ],
)
def test_wrong_usage_is_told_before_work_starts(
    drawn_root: Path, tmp_path: Path, words: list[str], message: str, caplog: Any
) -> None:
    first = ["--dataset", "synthetic", "--root", str(drawn_root), "--output", str(tmp_path / "o")]
    assert main([*first, *words]) == 2
    assert any(message.replace("\\", "") in record.getMessage() for record in caplog.records)
    assert not list(tmp_path.glob("o/*.tar"))


def test_settings_may_be_corrected_before_work_starts(
    drawn_root: Path, build: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    words = ["--dataset", "folder", "--root", str(drawn_root / "train"), "--output", str(tmp_path)]
    assert main([*words, "--pose-network", "nowhere.onnx"]) == 2
    assert "nowhere.onnx" in caplog.records[-1].getMessage()
    assert "Traceback" not in caplog.text
    keypoints = tmp_path / "keypoints.csv"
    write_patn_csv(keypoints, [("0000000/00.png", keypoints_of(STANDING))])
    options = ["--keypoints", keypoints, "--keypoints-frame", 256, 176, "--image-size", 32, 24]
    shards = build("folder", drawn_root / "train", tmp_path, *options)
    assert shards.manifest.rejects == {"no_keypoints": 17, "single_image": 1}


def test_a_root_without_photos_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "photos" / "somebody").mkdir(parents=True)
    (tmp_path / "photos" / "somebody" / "notes.txt").write_text("no photo")
    words = ["--dataset", "folder", "--root", str(tmp_path / "photos")]
    assert main([*words, "--output", str(tmp_path / "o")]) == 2
    assert "no photo was found in the root" in caplog.text
    assert "(1 files were left out)" in caplog.text


def test_a_table_without_its_columns_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "photos.csv").write_text("picture,who\na.jpg,anna\n")
    words = ["--dataset", "table", "--root", str(tmp_path / "photos.csv")]
    assert main([*words, "--output", str(tmp_path / "o")]) == 2
    assert caplog.text.count("photos.csv") == 1
    assert "its columns are picture, who" in caplog.text


def test_a_split_that_cannot_name_a_file_is_told() -> None:
    listing = list_dataset([Photo(path="a.jpg", name="a.jpg", person="p", split="../train")])
    with pytest.raises(ValueError, match=r"split '\.\./train': shards are named after it"):
        select_photos(listing, splits=None, limit=None, seed=0)


def test_an_output_of_something_else_is_refused(
    drawn_root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "train-000007.tar").write_bytes(b"somebody's")
    words = ["--dataset", "synthetic", "--root", str(drawn_root), "--output", str(tmp_path)]
    assert main(words) == 2
    assert (
        "holds train-000007.tar, but neither manifest.json nor _work/settings.json" in caplog.text
    )
    (tmp_path / "train-000007.tar").unlink()
    (tmp_path / "_work").mkdir()
    (tmp_path / "_work" / "novel.txt").write_text("somebody's")
    assert main(words) == 2
    assert "holds _work/novel.txt, but neither" in caplog.text
    assert (tmp_path / "_work" / "novel.txt").exists()


def test_a_damaged_set_is_not_complete(
    drawn_root: Path, drawn_shards: ShardSet, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    words = ["--dataset", "synthetic", "--root", str(drawn_root), "--output", str(tmp_path / "o")]
    words += ["--shard-size", "0.05"]
    shutil.copytree(drawn_shards.root, tmp_path / "o")
    (tmp_path / "o" / "train-000001.tar").unlink()
    (tmp_path / "o" / "index.parquet").write_bytes(b"short")
    assert main(words) == 2
    assert "2 of its files are missing or have another size, the first is train-" in caplog.text
    assert "copy them again, or remove the folder and build the shards again" in caplog.text
    (tmp_path / "o" / "manifest.json").write_bytes(b"\xff\xfe\x00")
    assert main(words) == 2
    assert "manifest.json: not JSON" in caplog.text
    (tmp_path / "o" / "manifest.json").unlink()
    assert main(words) == 2
    assert "set that lost its manifest, copy that again, or remove the folder" in caplog.text
    (tmp_path / "o" / "manifest.json").mkdir()
    assert main(words) == 2
    assert "manifest.json: Is a directory" in caplog.text
    assert "Traceback" not in caplog.text


def test_other_spellings_are_the_same_settings(
    build: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number, name in enumerate(("1.jpg", "2.jpg")):
        write_photo(tmp_path / "photos" / "anna" / name, number)
    names = [f"anna/{number}.jpg" for number in (1, 2)]
    (tmp_path / "pairs.csv").write_text(f"from,to\n{names[0]},{names[1]}\n")
    frame = ["--keypoints-frame", 256, 176]
    write_patn_csv(tmp_path / "kp.csv", [(name, keypoints_of(STANDING)) for name in names])
    build(
        "folder", tmp_path / "photos", tmp_path / "o", "--keypoints", tmp_path / "kp.csv", *frame,
        "--pairs", f"train={tmp_path}/pairs.csv", "--splits", "train",
    )  # fmt: skip
    monkeypatch.chdir(tmp_path / "photos")
    build(
        "folder", "./", "../o/", "--keypoints", "../kp.csv", "../photos/../kp.csv", *frame,
        "--pairs", "train=../pairs.csv", "--splits", "train", "train",
    )  # fmt: skip


def test_other_photos_are_not_what_the_set_was_made_of(
    build: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: Any
) -> None:
    write_photo(tmp_path / "photos" / "anna" / "1.jpg", 0)
    write_patn_csv(tmp_path / "kp.csv", [("anna/1.jpg", keypoints_of(STANDING))])
    options = ["--keypoints", str(tmp_path / "kp.csv"), "--keypoints-frame", "256", "176"]
    words = ["--dataset", "folder", "--root", str(tmp_path / "photos")]
    words += ["--output", str(tmp_path / "o"), *options]
    assert main(words) == 0
    assert "no pair in train: nothing to train on" in capsys.readouterr().out
    write_photo(tmp_path / "photos" / "anna" / "2.jpg", 1)
    assert main(words) == 2
    assert f"{tmp_path}/photos: other photos" in caplog.text
    shutil.rmtree(tmp_path / "photos")  # the set needs them no more
    assert main(words) == 0


def test_a_set_without_an_image_is_none(
    build: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    photo = tmp_path / "photos" / "anna" / "1.jpg"
    photo.parent.mkdir(parents=True)
    photo.write_bytes(b"")
    write_patn_csv(tmp_path / "kp.csv", [("anna/1.jpg", keypoints_of(STANDING))])
    options = ["--keypoints", str(tmp_path / "kp.csv"), "--keypoints-frame", "256", "176"]
    words = ["--dataset", "folder", "--root", str(tmp_path / "photos")]
    assert main([*words, "--output", str(tmp_path / "o"), *options]) == 1
    assert "no image could be stored, all were left out: 1 empty" in caplog.text
    assert not list((tmp_path / "o").iterdir())
    write_photo(photo, 0)
    build("folder", tmp_path / "photos", tmp_path / "o", *options)


@pytest.mark.parametrize("dataset", ["deepfashion", "folder", "market1501", "table"])
def test_a_root_without_permission_is_told(
    dataset: str, nobodys: Path, as_nobody: AsNobody, capsys: Any, caplog: Any
) -> None:
    root = nobodys / "closed"
    root.mkdir(mode=0)
    words = ["--dataset", dataset, "--root", str(root), "--output", str(nobodys / "o")]
    with as_nobody():
        assert main(words) == 2
        assert f"{root}: Permission denied; check" in caplog.text
        assert main([*words, "--check"]) == 2
    assert f"{root}: Permission denied; check" in capsys.readouterr().out


@pytest.mark.parametrize("closed", ["keypoints.csv", "o/manifest.json", "o"])
def test_files_without_permission_are_told(
    closed: str, nobodys: Path, as_nobody: AsNobody, caplog: pytest.LogCaptureFixture
) -> None:
    write_photo(nobodys / "photos" / "anna" / "1.jpg", 0)
    for name in ("keypoints.csv", "o/manifest.json"):
        (nobodys / name).parent.mkdir(exist_ok=True)
        (nobodys / name).touch()
    (nobodys / closed).chmod(0)
    words = ["--dataset", "folder", "--root", str(nobodys / "photos")]
    words += ["--output", str(nobodys / "o"), "--keypoints", str(nobodys / "keypoints.csv")]
    with as_nobody():
        assert main(words) == 2
    assert f"{nobodys / closed}" in caplog.messages[-1]
    assert "Permission denied; check the path, and that this user may" in caplog.messages[-1]


def test_a_root_that_cannot_be_asked_is_told_by_check(caplog: pytest.LogCaptureFixture) -> None:
    assert main(["--dataset", "folder", "--root", "nowhere://photos", "--check"]) == 2
    assert "nowhere://photos: cannot be reached (ValueError: Protocol" in caplog.text


def test_an_interrupted_check_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def interrupt(_: str) -> Iterator[Photo]:
        raise KeyboardInterrupt

    monkeypatch.setitem(DATASETS, "street", Dataset(list_photos=interrupt))
    assert main(["--dataset", "street", "--root", str(tmp_path), "--check"]) == 1
    assert "interrupted" in caplog.text


def test_a_check_that_counts_nothing_fails(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--dataset", "market1501", "--root", str(tmp_path), "--check"]) == 2
    assert "neither bounding_box_train nor bounding_box_test is here" in capsys.readouterr().out


def test_check_writes_nothing(
    deepfashion_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(tmp_path.rglob("*"))
    assert main(["--dataset", "deepfashion", "--root", str(deepfashion_root), "--check"]) == 0
    assert "48,674" in capsys.readouterr().out
    assert sorted(tmp_path.rglob("*")) == before


def test_without_output_there_is_only_check(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["--dataset", "folder", "--root", "."])
    assert "--output is needed" in capsys.readouterr().err


def test_help_is_short_and_has_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    text = capsys.readouterr().out
    assert len(text.splitlines()) < 60
    assert "python -m preprocessing.build_shards --dataset folder" in text


def test_the_format_agrees_with_the_pose_maps() -> None:
    assert NUM_JOINTS == pose.NUM_JOINTS
    assert POSE_SIZE == pose.POSE_MAP_SIZE


def test_a_network_finds_what_a_keypoint_file_lacks(
    shared_dir: Path, build: Any, tmp_path: Path
) -> None:
    network = shared_dir / "models/openpose_mobilenet_v2_small.onnx"
    folder = tmp_path / "photos" / "astronaut"
    folder.mkdir(parents=True)
    for name in ("known.jpg", "lacking.jpg"):
        (folder / name).symlink_to(shared_dir / "data/people/astronaut_0.jpg")
    write_patn_csv(tmp_path / "kp.csv", [("known.jpg", keypoints_of(STANDING))])
    frame = ["--keypoints-frame", 256, 176]
    shards = build(
        "folder", tmp_path / "photos", tmp_path / "o", "--image-size", 256, 176,
        "--keypoints", tmp_path / "kp.csv", *frame, "--pose-network", network,
    )  # fmt: skip
    known, lacking = keypoints_array(shards.read_index())
    np.testing.assert_array_equal(known, keypoints_of(STANDING))
    assert np.isfinite(lacking[:, 0]).sum() >= 5
    assert not np.array_equal(lacking, known)


def test_a_network_finds_the_keypoints(shared_dir: Path, build: Any, tmp_path: Path) -> None:
    network = shared_dir / "models/openpose_mobilenet_v2_small.onnx"
    for number, name in enumerate(["coco_000785_0.jpg", "aic_054d9ce9_0.jpg", "astronaut_0.jpg"]):
        path = tmp_path / "photos" / "train" / f"p{number // 2}" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(shared_dir / "data/people" / name)
    (tmp_path / "photos/train/p1/black.jpg").parent.mkdir(exist_ok=True)
    Image.new("RGB", (200, 300)).save(tmp_path / "photos/train/p1/black.jpg")
    (tmp_path / "photos/train/p1/broken.jpg").write_bytes(b"\xff\xd8\xff")
    shards = build("folder", tmp_path / "photos", tmp_path / "out", "--pose-network", network)
    rows = {Path(row["name"]).name: row for row in rows_of(shards)}
    assert rows["black.jpg"]["num_people"] == 0
    assert np.isnan(rows["black.jpg"]["keypoints"]).sum() == 36
    assert rows["coco_000785_0.jpg"]["num_people"] >= 1
    found = np.array(rows["coco_000785_0.jpg"]["keypoints"]).reshape(18, 3)
    assert np.isfinite(found[:, 0]).sum() >= 10
    assert np.nanmin(found[:, :2]) >= 0
    assert np.nanmax(found[:, :2]) <= 512
    rejects = {Path(r["name"]).name: r for r in shards.read_rejects().to_pylist()}
    assert rejects["black.jpg"]["reason"] == "no_person"
    assert rejects["broken.jpg"]["reason"] == "not_an_image"
    assert (rejects["broken.jpg"]["stage"], rejects["broken.jpg"]["is_stored"]) == (
        "keypoints", False,
    )  # fmt: skip


@pytest.fixture
def cluster() -> Iterator[str]:
    """The address of a Ray cluster of its own processes, as a user would start one."""
    ports = [free_port(), free_port()]
    words = [str(Path(sys.executable).with_name("ray")), "start", "--head", "--block"]
    words += [f"--port={ports[0]}", f"--ray-client-server-port={ports[1]}", "--num-cpus=2"]
    with tempfile.TemporaryDirectory(prefix="ray") as folder:  # short: sockets have long names
        words += ["--include-dashboard=false", f"--temp-dir={folder}"]
        process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, start_new_session=True)
        assert process.stdout is not None
        try:
            assert any("Ray runtime started" in line for line in process.stdout)
            yield f"127.0.0.1:{ports[0]}"
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.slow
def test_a_running_cluster_makes_the_same_shards(
    cluster: str, drawn_root: Path, drawn_shards: ShardSet, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "preprocessing.build_shards", "--dataset", "synthetic"]
    command += ["--root", str(drawn_root), "--shard-size", "0.05"]
    ways = {"option": ["--ray-address", cluster], "environment": []}
    for way, options in ways.items():
        environment = os.environ | ({} if options else {"RAY_ADDRESS": cluster})
        # From elsewhere: nothing of the working directory is needed, or sent.
        result = subprocess.run(
            [*command, "--output", str(tmp_path / way), *options],
            cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert result.returncode == 0, result.stderr
        assert f"joining the Ray cluster at {cluster}" in result.stderr
        assert files_of(tmp_path / way) == files_of(Path(drawn_shards.root))


def test_a_cluster_that_does_not_answer_is_told(drawn_root: Path, tmp_path: Path) -> None:
    address = f"ray://127.0.0.1:{free_port()}"
    command = [sys.executable, "-m", "preprocessing.build_shards", "--dataset", "synthetic"]
    command += ["--root", str(drawn_root), "--output", str(tmp_path / "out")]
    environment = os.environ | {"RAY_ADDRESS": address}  # as --ray-address, which comes first
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert f"no Ray cluster answers at {address}" in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "out" / "_work").exists()  # nothing keeps one from other settings
