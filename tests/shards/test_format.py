"""The format's definition, its documentation and its errors agree."""

import hashlib
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.local import LocalFileSystem

from shards import format as shard_format
from shards.format import (
    INDEX_FILE,
    INDEX_SCHEMA,
    MANIFEST_FILE,
    MEMBER_SUFFIXES,
    PAIRS_FILE,
    PAIRS_SCHEMA,
    REJECTS_FILE,
    REJECTS_SCHEMA,
    SAMPLE_FIELDS,
    FormatError,
    Manifest,
    ShardFile,
    SplitCounts,
    TableFile,
    keypoints_array,
    member_name,
    open_shards,
    sha256_of,
    shard_name,
)

README = Path(shard_format.__file__).with_name("README.md").read_text(encoding="utf-8")

MANIFEST = Manifest(
    dataset="folder",
    input_sha256="00",
    settings={"image_size": {"train": [512, 512], "test": None}},
    counts={"train": SplitCounts(images=1, persons=1, valid=1, pairs=0)},
    rejects={"single_image": 1},
    shards=(
        ShardFile(name="train-000000.tar", split="train", num_images=1, size_bytes=9, sha256="ab"),
    ),
    tables=(TableFile(name=INDEX_FILE, num_rows=1, size_bytes=9, sha256="cd"),),
)
KEYPOINTS = np.arange(54, dtype=np.float32)
ROW = {
    "key": "a", "name": "a.jpg", "person": "p", "split": "train", "view": None,
    "shard": "train-000000.tar", "image_extension": "jpg", "image_offset": 0,
    "image_size": 3, "pose_offset": 3, "pose_size": 4,
    "json_offset": 7, "json_size": 2, "latent_offset": None, "latent_size": None,
    "height": 512, "width": 512, "keypoints": KEYPOINTS, "num_people": None, "is_valid": True,
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / MANIFEST_FILE).write_text(MANIFEST.to_json())
    (tmp_path / "train-000000.tar").write_bytes(b"jpgpose{}")
    pq.write_table(pa.Table.from_pylist([ROW], INDEX_SCHEMA), tmp_path / INDEX_FILE)
    pq.write_table(
        pa.table({"source": [0, 1], "target": [1, 0], "split": ["train", "test"]}, PAIRS_SCHEMA),
        tmp_path / PAIRS_FILE,
    )
    pq.write_table(REJECTS_SCHEMA.empty_table(), tmp_path / REJECTS_FILE)
    return tmp_path


def documented_rows(heading: str) -> list[list[str]]:
    """Cells of the table under a heading of the README."""
    section = README.split(f"## {heading}\n")[1].split("\n## ")[0]
    rows = [
        line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("| `")
    ]
    return [[cell.strip(" |").strip("`") for cell in row] for row in rows]


@pytest.mark.parametrize(
    ("file", "schema"),
    [(INDEX_FILE, INDEX_SCHEMA), (PAIRS_FILE, PAIRS_SCHEMA), (REJECTS_FILE, REJECTS_SCHEMA)],
)
def test_readme_has_every_column_and_type_in_order(file: str, schema: pa.Schema) -> None:
    documented = [(row[0], row[1]) for row in documented_rows(file)]
    assert documented == [(field.name, str(field.type)) for field in schema]


def test_readme_has_version_members_and_record_fields() -> None:
    assert f"# Shard format, version {shard_format.FORMAT_VERSION}\n" in README
    rows = documented_rows("Tar members")
    members = {row[0]: row[1] for row in rows if row[1].startswith("`{key}") or "{key}" in row[1]}
    assert members == {m: "{key}." + suffix for m, suffix in MEMBER_SUFFIXES.items()}
    assert tuple(row[0] for row in rows if row[0] not in members) == SAMPLE_FIELDS
    assert f"at most {shard_format.MAX_KEY_LENGTH} characters" in README
    assert f"{shard_format.POSE_SIZE[0]} x {shard_format.POSE_SIZE[1]}" in README


def test_readme_has_every_manifest_field() -> None:
    rows = documented_rows(MANIFEST_FILE)
    assert {row[0] for row in rows} == json.loads(MANIFEST.to_json()).keys()
    meanings = {row[0]: re.findall(r"`(\w+)", row[1]) for row in rows}
    document = json.loads(MANIFEST.to_json())
    assert meanings["counts"] == list(document["counts"]["train"])
    assert meanings["shards"] == list(document["shards"][0])
    assert meanings["tables"] == list(document["tables"][0])


def test_manifest_survives_json() -> None:
    assert Manifest.from_json(MANIFEST.to_json(), "here") == MANIFEST


def test_tables_and_members_survive_a_round_trip(folder: Path) -> None:
    shards = open_shards(str(folder))
    index = shards.read_index()
    assert index.schema.equals(INDEX_SCHEMA)
    np.testing.assert_array_equal(keypoints_array(index)[0], KEYPOINTS.reshape(18, 3))
    row = index.to_pylist()[0]
    assert shards.read_member(row, "image") == b"jpg"
    assert shards.read_member(row, "pose") == b"pose"
    assert shards.read_member(row, "json") == b"{}"
    assert shards.read_member(row, "latent") is None
    assert shards.read_index(["person", "key"]).column_names == ["person", "key"]
    assert shards.read_pairs().num_rows == 2
    assert shards.read_pairs("test").to_pylist() == [{"source": 1, "target": 0, "split": "test"}]
    assert shards.read_rejects().num_rows == 0


def test_keypoints_of_a_part_of_the_index() -> None:
    rows = [ROW | {"keypoints": KEYPOINTS + number} for number in range(3)]
    part = pa.Table.from_pylist(rows, INDEX_SCHEMA).slice(1, 2)
    np.testing.assert_array_equal(keypoints_array(part)[:, 0, 0], [1, 2])


def test_names() -> None:
    assert shard_name("train", 43) == "train-000043.tar"
    assert member_name("k", "image") == "k.jpg"
    assert member_name("k", "image", "png") == "k.png"
    assert member_name("k", "pose", "png") == "k.pose.png"
    longest = max(len(suffix) for suffix in MEMBER_SUFFIXES.values())
    assert shard_format.MAX_KEY_LENGTH + 1 + longest <= 100  # ustar's limit for a name


def test_sha256_of_a_file(tmp_path: Path) -> None:
    data = bytes(range(256)) * 5000
    (tmp_path / "file").write_bytes(data)
    digest = hashlib.sha256(data).hexdigest()
    assert sha256_of(LocalFileSystem(), str(tmp_path / "file")) == digest


def test_open_says_when_there_is_no_manifest(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"holds no manifest\.json.*again"):
        open_shards(str(tmp_path))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("[]", "not a manifest of 'cfld-shards'"),
        ('{"version": 1}', "not a manifest of 'cfld-shards'"),
        (
            MANIFEST.to_json().replace('"version": 1', '"version": 7'),
            "format version 7, this",
        ),
        (MANIFEST.to_json().replace('"dataset"', '"data_set"'), "needs exactly the fields"),
        (MANIFEST.to_json().replace('"num_rows"', '"rows"'), "a malformed entry"),
    ],
)
def test_open_refuses_another_manifest(folder: Path, text: str, message: str) -> None:
    (folder / MANIFEST_FILE).write_text(text)
    with pytest.raises(FormatError, match=message):
        open_shards(str(folder))


def test_a_table_with_other_columns_is_refused(folder: Path) -> None:
    pq.write_table(pa.table({"key": ["a"]}), folder / INDEX_FILE)
    with pytest.raises(FormatError, match="its columns are not those of format version 1"):
        open_shards(str(folder)).read_index()


def test_a_missing_table_is_named(folder: Path) -> None:
    (folder / PAIRS_FILE).unlink()
    with pytest.raises(FormatError, match=r"pairs\.parquet is missing beside its manifest"):
        open_shards(str(folder)).read_pairs()


def test_a_short_shard_is_named(folder: Path) -> None:
    (folder / "train-000000.tar").write_bytes(b"jpgpo")
    with pytest.raises(FormatError, match="ends before byte 7"):
        open_shards(str(folder)).read_bytes("train-000000.tar", 3, 4)


def test_manifest_is_a_value() -> None:
    assert replace(MANIFEST, dataset="table") != MANIFEST
