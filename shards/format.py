"""The shard format, once: member names, table schemas, manifest, and reading by byte offset."""

from __future__ import annotations

import hashlib
import json
import posixpath
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq
from fsspec.spec import AbstractFileSystem
from jaxtyping import Float32

FORMAT_NAME = "cfld-shards"
FORMAT_VERSION = 1

MANIFEST_FILE = "manifest.json"
INDEX_FILE = "index.parquet"
PAIRS_FILE = "pairs.parquet"
REJECTS_FILE = "rejects.parquet"

NUM_JOINTS = 18
POSE_SIZE = (256, 256)
MAX_KEY_LENGTH = 80  # with the longest member suffix still under ustar's 100 bytes

# What follows "{key}." in the tar; an image kept in another format than JPEG keeps its extension.
MEMBER_SUFFIXES = {
    "image": "jpg",
    "pose": "pose.png",
    "json": "json",
    "latent": "latent.npy",
}

# Which of the manifest's settings says whose latents a set stores; absent if it stores none.
LATENT_SETTINGS = "latents"

SAMPLE_FIELDS = (
    "key",
    "name",
    "dataset",
    "person",
    "split",
    "view",
    "height",
    "width",
    "photo_height",
    "photo_width",
    "num_people",
    "is_valid",
    "keypoints",
)

_required = {"nullable": False}

INDEX_SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), **_required),
        pa.field("name", pa.string(), **_required),
        pa.field("person", pa.string(), **_required),
        pa.field("split", pa.string(), **_required),
        pa.field("view", pa.string()),
        pa.field("shard", pa.string(), **_required),
        pa.field("image_extension", pa.string(), **_required),
        pa.field("image_offset", pa.int64(), **_required),
        pa.field("image_size", pa.int64(), **_required),
        pa.field("pose_offset", pa.int64(), **_required),
        pa.field("pose_size", pa.int64(), **_required),
        pa.field("json_offset", pa.int64(), **_required),
        pa.field("json_size", pa.int64(), **_required),
        pa.field("latent_offset", pa.int64()),
        pa.field("latent_size", pa.int64()),
        pa.field("height", pa.int32(), **_required),
        pa.field("width", pa.int32(), **_required),
        pa.field("keypoints", pa.list_(pa.float32(), NUM_JOINTS * 3), **_required),
        pa.field("num_people", pa.int32()),
        pa.field("is_valid", pa.bool_(), **_required),
    ]
)

PAIRS_SCHEMA = pa.schema(
    [
        pa.field("source", pa.int32(), **_required),
        pa.field("target", pa.int32(), **_required),
        pa.field("split", pa.string(), **_required),
    ]
)

REJECTS_SCHEMA = pa.schema(
    [
        pa.field("path", pa.string(), **_required),
        pa.field("name", pa.string()),
        pa.field("stage", pa.string(), **_required),
        pa.field("reason", pa.string(), **_required),
        pa.field("detail", pa.string(), **_required),
        pa.field("is_stored", pa.bool_(), **_required),
    ]
)


class FormatError(ValueError):
    """A folder is not a complete shard set of the version that this code reads."""


@dataclass(frozen=True, kw_only=True)
class SplitCounts:
    """How much one split holds; `valid` counts the images that may stand in a pair."""

    images: int
    persons: int
    valid: int
    pairs: int


@dataclass(frozen=True, kw_only=True)
class ShardFile:
    """One tar of the set."""

    name: str
    split: str
    num_images: int
    size_bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class TableFile:
    """One parquet file of the set."""

    name: str
    num_rows: int
    size_bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a shard set holds and how it was made; its file is written last.

    `settings` are the resolved settings of the job, `input_sha256` identifies the listing that it
    worked on, `rejects` counts the rows of the rejects table by reason.
    """

    dataset: str
    input_sha256: str
    settings: Mapping[str, Any]
    counts: Mapping[str, SplitCounts]
    rejects: Mapping[str, int]
    shards: tuple[ShardFile, ...]
    tables: tuple[TableFile, ...]

    @property
    def files(self) -> tuple[ShardFile | TableFile, ...]:
        """All files of the set but the manifest itself."""
        return (*self.shards, *self.tables)

    @property
    def size_bytes(self) -> int:
        """What these files take together."""
        return sum(file.size_bytes for file in self.files)

    def to_json(self) -> str:
        """Return the text of the manifest's file."""
        header = {"format": FORMAT_NAME, "version": FORMAT_VERSION}
        return json.dumps(header | asdict(self), indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes, where: str) -> Manifest:
        """Read the text of a manifest's file; `where` names it in errors.

        Raises:
            FormatError: If it is not a manifest of this format and version.
        """
        try:
            document = json.loads(text)
        except ValueError as error:
            raise FormatError(f"{where}: not JSON ({error}); build the shards again") from error
        if not isinstance(document, dict) or document.pop("format", None) != FORMAT_NAME:
            raise FormatError(f"{where}: not a manifest of {FORMAT_NAME!r}")
        version = document.pop("version", None)
        if version != FORMAT_VERSION:
            raise FormatError(
                f"{where}: format version {version}, this reader needs {FORMAT_VERSION}; "
                "run 'python -m preprocessing.build_shards' again"
            )
        names = {field.name for field in fields(cls)}
        if document.keys() != names:
            raise FormatError(f"{where}: needs exactly the fields {sorted(names)}")
        try:
            counts = {split: SplitCounts(**each) for split, each in document["counts"].items()}
            shards = tuple(ShardFile(**each) for each in document["shards"])
            tables = tuple(TableFile(**each) for each in document["tables"])
        except (AttributeError, TypeError) as error:
            raise FormatError(f"{where}: a malformed entry ({error})") from error
        return cls(**document | {"counts": counts, "shards": shards, "tables": tables})


@dataclass(frozen=True, kw_only=True)
class ShardSet:
    """An opened shard set: a complete folder, local or remote."""

    fs: AbstractFileSystem
    root: str
    manifest: Manifest

    def path(self, name: str) -> str:
        """Return the path, on `fs`, of a file of the set."""
        return posixpath.join(self.root, name)

    def read_index(self, columns: Sequence[str] | None = None) -> pa.Table:
        """Read the index, a row per image, sorted by (split, person, name)."""
        return self._read_table(INDEX_FILE, INDEX_SCHEMA, columns)

    def read_pairs(self, split: str | None = None) -> pa.Table:
        """Read the pairs of one split or of all: row numbers of the index."""
        table = self._read_table(PAIRS_FILE, PAIRS_SCHEMA, None)
        return table if split is None else table.filter(pa.compute.field("split") == split)

    def read_rejects(self) -> pa.Table:
        """Read what was left out of the shards, or out of all pairs, and why."""
        return self._read_table(REJECTS_FILE, REJECTS_SCHEMA, None)

    def read_bytes(self, shard: str, offset: int, size: int) -> bytes:
        """Read one member of a shard by its place.

        Raises:
            FormatError: If the shard ends before, or its server cannot send a part of it.
        """
        # Not open() and seek(): of a remote file that fetches megabytes more than was asked for.
        data: bytes = self.fs.cat_file(self.path(shard), start=offset, end=offset + size)
        if len(data) > size:
            raise FormatError(
                f"{self.path(shard)}: its server does not support byte ranges; copy the shards to "
                "a local folder, or serve them by another one (S3, nginx)"
            )
        if len(data) < size:
            raise FormatError(
                f"{self.path(shard)}: ends before byte {offset + size}, which the index asks for; "
                "find what is damaged with 'python -m preprocessing.inspect_shards --verify'"
            )
        return data

    def read_member(self, row: Mapping[str, Any], member: str) -> bytes | None:
        """Read a member (`image`, `pose`, `json`, `latent`) of one index row; None if it has none.

        `row` needs the columns `shard`, `{member}_offset` and `{member}_size`.
        """
        offset, size = row[f"{member}_offset"], row[f"{member}_size"]
        return None if offset is None else self.read_bytes(row["shard"], offset, size)

    def _read_table(self, name: str, schema: pa.Schema, columns: Sequence[str] | None) -> pa.Table:
        try:
            with self.fs.open(self.path(name), "rb") as file, pq.ParquetFile(file) as table:
                if not table.schema_arrow.equals(schema):
                    raise FormatError(
                        f"{self.path(name)}: its columns are not those of format version "
                        f"{FORMAT_VERSION}"
                    )
                return table.read(columns=None if columns is None else list(columns))
        except FileNotFoundError as error:
            raise FormatError(
                f"{self.path(name)} is missing beside its manifest; copy the whole folder"
            ) from error


def open_shards(url: str) -> ShardSet:
    """Open a complete shard set at a local path or fsspec URL.

    Raises:
        FormatError: If there is no manifest, or not one of this format and version.
    """
    fs, root = fsspec.core.url_to_fs(url)
    path = posixpath.join(root, MANIFEST_FILE)
    try:
        text = fs.cat_file(path)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise FormatError(
            f"{url} holds no {MANIFEST_FILE}: not a shard set, or its job has not finished; "
            "run 'python -m preprocessing.build_shards' (again: it goes on where it stopped)"
        ) from error
    return ShardSet(fs=fs, root=root, manifest=Manifest.from_json(text, path))


def keypoints_array(index: pa.Table) -> Float32[np.ndarray, "images 18 3"]:
    """Return the index's keypoints: x, y (pixels of the stored image), score; lost: NaN, NaN, 0."""
    flat = index["keypoints"].combine_chunks().flatten()
    return flat.to_numpy(zero_copy_only=False).reshape(-1, NUM_JOINTS, 3)


def member_name(key: str, member: str, image_extension: str = "jpg") -> str:
    """Return the tar name of one member (`image`, `pose`, `json`, `latent`) of a sample."""
    return f"{key}.{image_extension if member == 'image' else MEMBER_SUFFIXES[member]}"


def shard_name(split: str, number: int) -> str:
    """Return the file name of a split's shard; brace notation: `train-{000000..000043}.tar`."""
    return f"{split}-{number:06d}.tar"


def sha256_of(fs: AbstractFileSystem, path: str) -> str:
    """Return the hexadecimal sha256 of a file's content."""
    digest = hashlib.sha256()
    with fs.open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
