"""Real photos through the whole way: folders and a pose network, and trees with published csvs."""

import csv
import gzip
import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cfld.images import decode_image, resize_image
from cfld.keypoints import read_keypoints
from preprocessing.datasets.deepfashion import raw_path
from shards.format import keypoints_array, open_shards
from tests.keypoint_files import write_patn_csv

REPOSITORY = Path(__file__).resolve().parents[1]
DEEPSPEED = Path(sys.executable).parent / "deepspeed"

pytestmark = pytest.mark.slow


def run(*command) -> str:
    done = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, check=False, timeout=900
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def build(*options) -> str:
    return run(sys.executable, "-m", "preprocessing.build_shards", *options)


@pytest.fixture(scope="module")
def people(shared_dir):
    """Photos of persons who have several: paths by person."""
    folder = shared_dir / "data" / "people"
    with (folder / "people.csv").open(newline="") as file:
        by_person = defaultdict(list)
        for row in csv.DictReader(file):
            by_person[row["person_id"]].append(folder / row["name"])
    return {person: paths for person, paths in by_person.items() if len(paths) > 2}


@pytest.fixture(scope="module")
def keypoints(shared_dir):
    entries = read_keypoints(shared_dir / "data" / "people" / "annotations.csv")
    return {entry.name: entry.people[0] for entry in entries}


def test_a_folder_of_photos_becomes_a_pipeline_that_makes_pictures(people, shared_dir, tmp_path):
    network = shared_dir / "models" / "openpose_mobilenet_v2_small.onnx"
    for number, (person, paths) in enumerate(people.items()):
        folder = tmp_path / "photos" / ("test" if number == 0 else "train") / person
        folder.mkdir(parents=True)
        for path in paths:
            shutil.copy(path, folder)
    build("--dataset", "folder", "--root", tmp_path / "photos", "--pose-network", network,
          "--output", tmp_path / "shards", "--image-size", 64, 64)  # fmt: skip
    shards = open_shards(str(tmp_path / "shards"))
    assert shards.manifest.counts["train"].images == sum(map(len, people.values())) - len(
        next(iter(people.values()))
    )
    assert shards.read_pairs("train").num_rows >= 20
    sets = (
        f"data.photos.url={tmp_path / 'shards'}",
        f"validation.url={tmp_path / 'shards'}",
        "validation.split=test",
    )
    run(DEEPSPEED, "--num_accelerators", 2, REPOSITORY / "train" / "main.py",
        "--config", REPOSITORY / "train" / "configs" / "tiny.yaml",
        "--set", *sets, f"output={tmp_path / 'run'}", "steps=2")  # fmt: skip
    source, pose = next(iter(people.values()))[:2]
    run(sys.executable, "-m", "cfld.generate", "--weights", tmp_path / "run" / "pipeline",
        "--image", source, "--pose", pose, "--pose-network", network, "--steps", 3,
        "--output", tmp_path / "out.png")  # fmt: skip
    picture = Image.open(tmp_path / "out.png")
    assert picture.mode == "RGB"
    assert picture.size == Image.open(source).size


def test_a_tree_of_deepfashion(people, keypoints, shared_dir, tmp_path):
    """Real photos under real names of the benchmark, with keypoints in its published frame."""
    root, frame, photos = (
        tmp_path / "fashion",
        (256, 176),
        [p for ps in people.values() for p in ps],
    )
    names = {}
    root.mkdir()
    for split in ("train", "test"):
        listed = shared_dir / "data" / "deepfashion" / f"{split}.lst.gz"
        shutil.copy(listed, root)
        of_person = defaultdict(list)
        for name in gzip.decompress(listed.read_bytes()).decode().split():
            of_person[name.rpartition("_")[0]].append(name)
        chosen = [each[:3] for each in of_person.values() if len(each) >= 3][:3]
        names[split] = [name for each in chosen for name in each]
        rows = []
        for name in names[split]:
            photo = photos.pop()
            path = root / "Img" / "img_highres" / raw_path(name)
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(photo, path)
            rows.append((name, scaled(keypoints[photo.name], photo, frame)))
        write_patn_csv(root / f"fasion-resize-annotation-{split}.csv", rows)
    build("--dataset", "deepfashion", "--root", root, "--output", tmp_path / "shards",
          "--image-size", 256, 176)  # fmt: skip
    check(tmp_path / "shards", root, names, frame, "fasion-resize-annotation-{}.csv")


def test_a_tree_of_market(people, keypoints, tmp_path):
    """Real photos at the benchmark's size, under names of its kind."""
    root, size, photos = tmp_path / "market", (128, 64), [p for ps in people.values() for p in ps]
    names = {"train": [], "test": []}
    for split, persons in (("train", (2, 7, 10)), ("test", (1, 3))):
        folder = root / f"bounding_box_{split}"
        folder.mkdir(parents=True)
        rows = []
        for person in persons:
            for camera in (1, 2, 3):
                photo = photos.pop()
                name = f"{person:04d}_c{camera}s1_{camera * 451:06d}_03.jpg"
                image = resize_image(decode_image(photo.read_bytes()), size)
                Image.fromarray(image).save(folder / name, quality=95)
                rows.append((name, scaled(keypoints[photo.name], photo, size)))
                names[split].append(name)
        write_patn_csv(root / f"market-annotation-{split}.csv", rows)
    (root / "query").mkdir()
    build("--dataset", "market1501", "--root", root, "--output", tmp_path / "shards",
          "--image-size", "original")  # fmt: skip
    check(tmp_path / "shards", root, names, size, "market-annotation-{}.csv")


def scaled(points, photo, frame):
    width, height = Image.open(photo).size
    return points * np.array([frame[1] / width, frame[0] / height, 1])


def check(folder, root, names, frame, annotations):
    """Every photo is stored, with the published keypoints at its size, and all pairs are there."""
    shards = open_shards(str(folder))
    index = shards.read_index()
    stored = dict(zip(index["name"].to_pylist(), keypoints_array(index), strict=True))
    assert {Path(name).name for name in stored} == set(names["train"]) | set(names["test"])
    valid = dict(zip(index["name"].to_pylist(), index["is_valid"].to_pylist(), strict=True))
    persons = dict(zip(index["name"].to_pylist(), index["person"].to_pylist(), strict=True))
    for split in names:
        published = {
            entry.name: entry.people[0]
            for entry in read_keypoints(root / annotations.format(split))
        }
        of_split = [name for name in stored if Path(name).name in published]
        for name in of_split:
            row = index["name"].to_pylist().index(name)
            size = np.array([index["width"][row].as_py(), index["height"][row].as_py()])
            expected = published[Path(name).name][:, :2] * size / np.array(frame[::-1])
            np.testing.assert_allclose(stored[name][:, :2], expected, atol=1)
        expected_pairs = sum(
            valid[a] and valid[b] and persons[a] == persons[b] and a != b
            for a in of_split
            for b in of_split
        )
        assert shards.read_pairs(split).num_rows == expected_pairs > 0
