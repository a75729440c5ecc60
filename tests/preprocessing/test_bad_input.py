"""Bad input never stops the job and never vanishes: each kind has its reason, and is counted."""

import io
import json
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from PIL import Image

from cfld.images import ImageError, decode_image
from cfld.keypoints import ImagePeople, KeypointsError
from preprocessing.build_shards import main
from preprocessing.listing import Photo, to_text
from preprocessing.listing_stage import list_dataset
from preprocessing.photo_reader import PhotoStoreError, read_ahead, read_photo, read_size
from preprocessing.published_keypoints import read_published
from preprocessing.shard_stage import lies_outside
from shards.format import ShardSet, open_shards
from tests.keypoint_files import write_coco_json, write_openpose_json, write_patn_csv

COLOURS = np.random.default_rng(0).integers(0, 256, (40, 30, 3), np.uint8)
PICTURE = Image.fromarray(COLOURS).resize((60, 80))


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def bomb() -> bytes:
    """A PNG of a few bytes whose header promises 30,000 x 30,000 pixels."""
    data = bytearray(encoded(Image.new("RGB", (1, 1)), "PNG"))
    data[16:24] = struct.pack(">II", 30_000, 30_000)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    return bytes(data)


def damaged_header() -> bytes:
    """A rotated JPEG one byte of whose EXIF block makes Pillow raise what no one expects."""
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "Maker"
    data = bytearray(encoded(PICTURE, "JPEG", exif=exif))
    data[data.index(b"Exif") + 17] = 0
    return bytes(data)


def rotated() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn right by 90 degrees to show
    return encoded(PICTURE, "JPEG", exif=exif)


UNREADABLE = {
    "truncated": encoded(PICTURE, "JPEG", quality=95)[:-400],
    "truncated_header": encoded(PICTURE, "PNG")[:20],
    "damaged_header": damaged_header(),
    "empty": b"",
    "not_an_image": b"this is text",
    "decompression_bomb": bomb(),
}
CONVERTED = {
    "cmyk.jpg": encoded(PICTURE.convert("CMYK"), "JPEG"),
    "grey.jpg": encoded(PICTURE.convert("L"), "JPEG"),
    "sixteen_bit.png": encoded(
        Image.fromarray(np.asarray(PICTURE.convert("L")).astype(np.uint16) << 8), "PNG"
    ),
    "palette.png": encoded(PICTURE.convert("P"), "PNG"),
    "transparent.png": encoded(PICTURE.convert("RGBA"), "PNG"),
    "rotated.jpg": rotated(),
    "animated.gif": encoded(
        PICTURE, "GIF", save_all=True, append_images=[PICTURE.transpose(Image.Transpose.ROTATE_180)]
    ),
}
ODD_NAMES = ["a.b.c.jpg", "sp ace.jpg", "ümläut.jpg", "quote'\".jpg", "new\nline.jpg", "a.pose.png"]
REASON_OF = {
    "truncated.jpg": ("shards", "truncated"),
    "truncated_header.jpg": ("shards", "truncated"),
    "damaged_header.jpg": ("shards", "truncated"),
    "empty.jpg": ("shards", "empty"),
    "not_an_image.jpg": ("shards", "not_an_image"),
    "decompression_bomb.jpg": ("shards", "decompression_bomb"),
    "loop.jpg": ("shards", "unreadable"),
    "pipe.jpg": ("shards", "unreadable"),
    "caf\\xe9.jpg": ("listing", "undecodable_name"),
    "dangling.jpg": ("shards", "missing_file"),
}


@dataclass
class Outcome:
    root: Path
    shards: ShardSet
    summary: str

    def rejects(self) -> dict[str, dict[str, Any]]:
        rows = self.shards.read_rejects().to_pylist()
        return {Path(row["name"] or row["path"]).name: row for row in rows}

    def stored(self) -> dict[str, dict[str, Any]]:
        return {Path(row["name"]).name: row for row in self.shards.read_index().to_pylist()}


@pytest.fixture(scope="module")
def outcome(ray_workers: int, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """The command on a folder of everything that can be wrong with photos and keypoints."""
    folder = tmp_path_factory.mktemp("bad")
    root = folder / "photos"
    files = {f"bad/{name}.jpg": data for name, data in UNREADABLE.items()}
    files |= {f"odd/{name}": data for name, data in CONVERTED.items()}
    files |= {f"named/{name}": encoded(PICTURE, "JPEG") for name in ODD_NAMES}
    files |= {"alone/one.jpg": encoded(PICTURE, "JPEG"), "nobody/a.jpg": encoded(PICTURE, "JPEG")}
    files |= {"nobody/unlisted.jpg": encoded(PICTURE, "JPEG")}
    files |= {"nobody/half.jpg": encoded(PICTURE, "JPEG")}
    files |= {f"nobody/{name}.jpg": encoded(PICTURE, "JPEG") for name in ("outside", "guessed")}
    for split in ("train", "test"):
        for name, data in files.items():
            path = root / split / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
    (root / "train/bad/loop.jpg").symlink_to("loop.jpg")
    (root / "train/bad/dangling.jpg").symlink_to("nowhere.jpg")
    os.mkfifo(root / "train/bad/pipe.jpg")
    (root / "train/bad/caf\udce9.jpg").touch()  # a byte that is no UTF-8
    found = np.concatenate([np.arange(5, 23)[:, None].repeat(2, 1), np.ones((18, 1))], axis=1)
    nobody = np.tile(np.array([np.nan, np.nan, 0]), (18, 1))
    half = np.where(np.arange(18)[:, None] < 8, found, nobody)
    outside = np.where(np.arange(18)[:, None] == 2, [9e9, 9, 1], found)  # in a photo 60 wide
    guessed = np.where(np.arange(18)[:, None] == 4, [9e9, 9, 1], found)
    special = {"a.jpg": nobody, "half.jpg": half, "outside.jpg": outside, "guessed.jpg": guessed}
    names = [f"{split}/{name}" for split in ("train", "test") for name in files]
    listed = [name for name in names if "unlisted" not in name and "\n" not in name]
    keypoints = folder / "keypoints.csv"
    write_patn_csv(
        keypoints,
        [(name, special.get(Path(name).name, found).astype(np.float32)) for name in listed],
    )
    with keypoints.open("a") as file:
        file.write("no_such.jpg: [1]: [2]\nno colon\n")
        file.write(f"train/gone.jpg: {[1] * 18}: {[1] * 18}\n{names[0]}: {[1] * 18}: {[1] * 18}\n")
    words = ["--dataset", "folder", "--root", root, "--output", folder / "out"]
    words += ["--keypoints", keypoints]
    buffer = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.stdout", buffer)
        assert main([str(word) for word in words]) == 0
    return Outcome(root, open_shards(str(folder / "out")), buffer.getvalue())


@pytest.mark.parametrize("name", REASON_OF)
def test_what_cannot_be_read_is_left_out_with_its_reason(outcome: Outcome, name: str) -> None:
    stage, reason = REASON_OF[name]
    reject = outcome.rejects()[name]
    assert (reject["stage"], reject["reason"], reject["is_stored"]) == (stage, reason, False)
    assert reject["path"].endswith(name)
    assert name not in outcome.stored()


@pytest.mark.parametrize("name", CONVERTED)
def test_what_can_be_converted_is_stored(outcome: Outcome, name: str) -> None:
    photo = decode_image(CONVERTED[name])
    rows = [row for row in outcome.shards.read_index().to_pylist() if row["name"].endswith(name)]
    test, train = rows
    assert outcome.shards.read_member(test, "image") == CONVERTED[name]
    assert test["image_extension"] == name.rpartition(".")[2]
    assert (test["height"], test["width"]) == photo.shape[:2]
    image = Image.open(io.BytesIO(outcome.shards.read_member(train, "image") or b""))
    assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (512, 512))
    assert train["is_valid"]


def test_a_rotated_photo_is_stored_upright(outcome: Outcome) -> None:
    row = next(
        r for r in outcome.shards.read_index().to_pylist() if "test/odd/rotated" in r["name"]
    )
    assert (row["height"], row["width"]) == (60, 80)  # the file itself has 80 rows


@pytest.mark.parametrize("name", ODD_NAMES)
def test_odd_names_are_kept_with_plain_keys(outcome: Outcome, name: str) -> None:
    row = outcome.stored()[name]
    assert row["name"] == f"train/named/{name}"
    assert row["key"].replace("-", "").replace("_", "").isalnum()
    assert row["key"].isascii()


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("one.jpg", "single_image"),
        ("a.jpg", "no_person"),
        ("half.jpg", "too_few_joints"),
        ("outside.jpg", "keypoints_outside"),
        ("unlisted.jpg", "no_keypoints"),
    ],
)
def test_images_in_no_pair_are_stored_with_their_reason(
    outcome: Outcome, name: str, reason: str
) -> None:
    reject = outcome.rejects()[name]
    assert (reject["stage"], reject["reason"], reject["is_stored"]) == ("pairs", reason, True)
    assert name in outcome.stored()


def test_a_joint_guessed_outside_is_missing_and_the_image_stays_in_pairs(outcome: Outcome) -> None:
    rows = [row for row in outcome.shards.read_index().to_pylist() if "guessed" in row["name"]]
    assert all(row["is_valid"] for row in rows)
    assert all(np.isnan(row["keypoints"][3 * 4 : 3 * 4 + 2]).all() for row in rows)
    assert len(rows) == 2


def test_joints_are_outside_only_beyond_what_detectors_do() -> None:
    keypoints = np.full((18, 3), 50, np.float32)
    keypoints[:6, 0] = [-4.9, -5.1, 103.9, 104.1, np.nan, 99]
    keypoints[6:9, 1] = [-9.9, 208.9, 209.1]
    (found,) = np.nonzero(lies_outside(keypoints, (200, 100)))
    assert found.tolist() == [1, 3, 8]


def test_rows_of_a_keypoint_file_that_lead_nowhere_are_noted(outcome: Outcome) -> None:
    rows = outcome.shards.read_rejects().to_pylist()
    of_file = [row for row in rows if row["stage"] == "keypoints"]
    details = {(row["reason"], row["detail"]) for row in of_file}
    assert ("no_such_image", "train/gone.jpg") in details
    again = [row for row in of_file if row["reason"] == "listed_twice"]
    assert [row["detail"] for row in again] == ["train/bad/truncated.jpg: the first entry counts"]
    assert all(row["path"].rpartition(":")[2].isdecimal() for row in of_file)
    malformed = [row for row in of_file if row["reason"] == "malformed_row"]
    assert len(malformed) == 2
    assert all(":" in row["path"] for row in malformed)


def test_every_reason_has_its_line_in_the_summary_and_its_count(outcome: Outcome) -> None:
    lines = [line.split() for line in outcome.summary.splitlines()]
    counts = {
        words[1]: int(words[0]) for words in lines if len(words) == 2 and words[0].isdecimal()
    }
    assert counts == dict(outcome.shards.manifest.rejects)
    rows = outcome.shards.read_rejects().to_pylist()
    assert sum(counts.values()) == len(rows)
    assert {row["reason"] for row in rows} == counts.keys()


def test_nothing_vanishes(outcome: Outcome) -> None:
    """Each file of the root is stored or rejected, and none is both but for the unpaired."""
    paths = (p for p in outcome.root.rglob("*") if not p.is_dir())
    files = {to_text(str(path.relative_to(outcome.root))) for path in paths}
    rejects = outcome.shards.read_rejects().to_pylist()
    stored = set(outcome.shards.read_index(["name"])["name"].to_pylist())
    left_out = {r["path"].removeprefix(f"{outcome.root}/") for r in rejects if not r["is_stored"]}
    assert stored | left_out & files == files
    assert {r["name"] for r in rejects if r["is_stored"]} <= stored
    assert not stored & {r["name"] for r in rejects if r["stage"] == "shards"}


def test_of_two_files_of_one_name_the_first_counts() -> None:
    photos = [
        Photo(path=path, name="same.jpg", person="p", split="train") for path in ("/b", "/a", "/c")
    ]
    listing = list_dataset(photos)
    assert listing.photos["path"].to_pylist() == ["/b"]
    rejects = listing.rejects.to_pylist()
    assert [(r["path"], r["name"], r["reason"]) for r in rejects] == [
        ("/a", "same.jpg", "duplicate_name"), ("/c", "same.jpg", "duplicate_name"),
    ]  # fmt: skip


def test_duplicate_rows_of_a_table_end_in_rejects_and_summary(
    ray_workers: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.jpg").write_bytes(encoded(PICTURE, "JPEG"))
    cell = json.dumps([[5, 5, 1]] * 18)
    rows = "".join(f'{name},1,"{cell}"\n' for name in ("a.jpg", "./a.jpg", "gone.jpg"))
    (tmp_path / "photos.csv").write_text("image,person_id,keypoints\n" + rows)
    words = ["--dataset", "table", "--root", str(tmp_path), "--output", str(tmp_path / "out")]
    assert main(words) == 0
    rejects = open_shards(str(tmp_path / "out")).read_rejects().to_pylist()
    assert sorted((row["reason"], Path(row["path"]).name) for row in rejects) == [
        ("duplicate_name", "a.jpg"), ("missing_image", "gone.jpg"), ("single_image", "a.jpg"),
    ]  # fmt: skip
    summary = capsys.readouterr().out.split()
    assert all(summary[summary.index(row["reason"]) - 1] == "1" for row in rejects)


def test_a_photo_without_permission_is_unreadable(
    as_nobody: Callable[[], AbstractContextManager[None]],
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        path = Path(folder) / "secret.jpg"
        path.write_bytes(b"x")
        path.chmod(0)
        with as_nobody(), pytest.raises(ImageError, match=r"unreadable: .*Permission denied"):
            read_photo(str(path))


@pytest.mark.slow
def test_photos_and_folders_without_permission_end_in_rejects_and_summary(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "preprocessing.build_shards", "--dataset", "folder"]
    if os.geteuid() == 0:
        if shutil.which("setpriv") is None:
            pytest.skip("root may read everything, and there is no setpriv to give that up")
        command = ["setpriv", "--bounding-set=-dac_override,-dac_read_search", *command]
    root, output = tmp_path / "photos", tmp_path / "out"
    for name in ("p/a.jpg", "p/b.jpg", "p/secret.jpg", "closed/c.jpg"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(encoded(PICTURE, "JPEG"))
    (root / "p/secret.jpg").chmod(0)
    (root / "closed").chmod(0)
    keypoints = np.tile(np.array([9, 9, 1], np.float32), (18, 1))
    write_patn_csv(tmp_path / "k.csv", [(name, keypoints) for name in ("a.jpg", "b.jpg")])
    command += ["--root", str(root), "--output", str(output), "--num-workers", "1"]
    command += ["--keypoints", str(tmp_path / "k.csv")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    (root / "closed").chmod(0o755)
    assert result.returncode == 0, result.stderr
    rejects = open_shards(str(output)).read_rejects().to_pylist()
    unreadable = [row["path"] for row in rejects if row["reason"] == "unreadable"]
    assert unreadable == [f"{root}/closed/", f"{root}/p/secret.jpg"]
    assert "2  unreadable" in result.stdout


def test_a_folder_named_like_a_photo_is_unreadable(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").mkdir()
    with pytest.raises(ImageError, match=r"unreadable: .*directory"):
        read_photo(str(tmp_path / "a.jpg"))


class RefusingFileSystem(MemoryFileSystem):
    """A remote store that forbids some objects and fails for others."""

    protocol = "refusing"

    def cat_file(self, path: str, *_: Any, **__: Any) -> bytes:
        if "forbidden" in path:
            raise PermissionError(path)
        if "credentials" in path:
            raise LookupError("no credentials")  # as boto's and aiohttp's: of no common kind
        raise OSError("connection reset")

    def isfile(self, *_: Any) -> bool:
        raise LookupError("no endpoint")


def test_a_store_that_fails_is_not_a_bad_photo() -> None:
    fsspec.register_implementation("refusing", RefusingFileSystem, clobber=True)
    with pytest.raises(ImageError, match="unreadable"):
        read_photo("refusing://forbidden.jpg")
    with pytest.raises(PhotoStoreError, match=r"refusing://a.jpg: OSError: connection reset"):
        read_photo("refusing://a.jpg")
    with pytest.raises(PhotoStoreError, match=r"LookupError: no credentials"):
        read_photo("refusing://credentials.jpg")
    with pytest.raises(PhotoStoreError, match=r"nosuch://a.jpg: ValueError: Protocol not known"):
        read_photo("nosuch://a.jpg")
    with pytest.raises(PhotoStoreError, match=r"LookupError: no endpoint"):
        read_size("refusing://a.jpg")


def test_photos_come_in_order_however_many(tmp_path: Path) -> None:
    paths = [tmp_path / f"{number}.jpg" for number in range(50)]
    for path in paths:
        path.write_bytes(path.name.encode())
    futures = read_ahead([*map(str, paths), str(tmp_path / "none")])
    assert [next(futures).result() for _ in paths] == [path.name.encode() for path in paths]
    with pytest.raises(ImageError, match="missing_file"):
        next(futures).result()


NONE = pa.array([], pa.string())


def test_keypoint_names_match_by_file_name_only_where_that_is_unique(tmp_path: Path) -> None:
    path = tmp_path / "keypoints.csv"
    keypoints = np.ones((18, 3), np.float32)
    write_patn_csv(path, [(name, keypoints) for name in ("a.jpg", "b", "c", "p/d.jpg", "e.jpg")])
    names = pa.array(["p/a.jpg", "p/b.png", "p/c.jpg", "q/c.jpg", "p/d.jpg"])
    found, rejects = read_published([str(path)], None, names, NONE)
    assert found["name"].to_pylist() == ["p/a.jpg", "p/b.png", "p/d.jpg"]
    assert [(row["path"], row["reason"], row["detail"]) for row in rejects.to_pylist()] == [
        (f"{path}:4", "ambiguous_name", "c"), (f"{path}:6", "no_such_image", "e.jpg"),
    ]  # fmt: skip


def test_a_selection_does_not_change_whose_keypoints_a_file_holds(tmp_path: Path) -> None:
    path = tmp_path / "1_keypoints.json"
    write_openpose_json(path, np.full((1, 18, 3), 9, np.float32))
    selected, other = pa.array(["a/1.jpg"]), pa.array(["b/1.jpg"])
    found, rejects = read_published([str(path)], None, selected, other)
    assert (found.num_rows, rejects["reason"].to_pylist()) == (0, ["ambiguous_name"])
    found, rejects = read_published([str(path)], None, pa.array(["a/2.jpg"]), other)
    assert (found.num_rows, rejects.num_rows) == (0, 0)


def test_a_coco_files_numbers_need_no_leading_zeros(tmp_path: Path) -> None:
    people = [ImagePeople("139", np.full((1, 18, 3), 9, np.float32))]
    write_coco_json(tmp_path / "results.json", people, as_results=True)
    names = pa.array(["p/000000000139.jpg", "p/000000001390.jpg"])
    found, _ = read_published([str(tmp_path / "results.json")], None, names, NONE)
    assert found["name"].to_pylist() == ["p/000000000139.jpg"]


def test_one_malformed_file_of_several_is_a_reject(tmp_path: Path) -> None:
    good, bad = str(tmp_path / "a.json"), str(tmp_path / "b.json")
    write_openpose_json(good, np.full((1, 18, 3), 9, np.float32))
    Path(bad).write_text('{"people": [')
    found, rejects = read_published([bad, good], None, pa.array(["a.jpg"]), NONE)
    assert found["name"].to_pylist() == ["a.jpg"]
    (reject,) = rejects.to_pylist()
    assert (reject["path"], reject["reason"]) == (bad, "malformed_file")
    with pytest.raises(KeypointsError, match=r"b\.json: neither a csv"):
        read_published([bad], None, pa.array(["a.jpg"]), NONE)


def test_a_folder_of_keypoints_is_listed_whatever_its_name(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    poses, photos = tmp_path / "poses[1]", tmp_path / "photos"
    poses.mkdir()
    words = ["--dataset", "folder", "--root", photos, "--output", tmp_path / "out"]
    words += ["--keypoints", poses]
    assert main([str(word) for word in words]) == 2
    assert "poses[1]: there is no .json file in this folder" in caplog.text
    for name in ("1.jpg", "2.jpg"):
        (photos / "p").mkdir(parents=True, exist_ok=True)
        (photos / "p" / name).write_bytes(encoded(PICTURE, "JPEG"))
        points = np.concatenate([np.arange(5, 41).reshape(18, 2), np.ones((18, 1))], axis=1)
        write_openpose_json(poses / f"{name[0]}_keypoints.JSON", points[None].astype(np.float32))
    assert main([str(word) for word in words]) == 0
    assert open_shards(str(tmp_path / "out")).read_pairs().num_rows == 2
