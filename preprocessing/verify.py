"""Compares a shard set with its manifest and index, byte for byte, and says where damage lies."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from aiohttp import ClientError
from PIL import Image

from cfld.images import ImageError, decode_image
from preprocessing.progress import Progress
from shards.format import (
    INDEX_FILE,
    MEMBER_SUFFIXES,
    POSE_SIZE,
    SAMPLE_FIELDS,
    ShardFile,
    ShardSet,
    TableFile,
    member_name,
)

MAX_PROBLEMS_PER_FILE = 10
REPAIR = "copy them again, or remove the folder and build the shards again"

_LATENT_AXES = 3
_BLOCK = tarfile.BLOCKSIZE
_NUM_THREADS = 4
_READ_SIZE_BYTES = 4 << 20


@dataclass(frozen=True, kw_only=True)
class Problem:
    """What is wrong with a file of the set; `key` names the sample in which it lies, if known."""

    file: str
    what: str
    key: str | None = None

    def __str__(self) -> str:
        sample = "" if self.key is None else f"sample {self.key}: "
        return f"{self.file}: {sample}{self.what}"


@dataclass(frozen=True, kw_only=True)
class _Member:
    """A member of a shard, where the index places it; `row` is the sample's row of the index."""

    kind: str
    name: str
    offset: int
    size_bytes: int
    row: Mapping[str, Any]


class _HashedFile:
    """A file that is read in order, and hashed on the way."""

    def __init__(self, file: Any) -> None:  # fsspec names no common type
        self._file = file
        self._digest = hashlib.sha256()
        self.size_bytes = 0
        self.is_at_end = False

    @property
    def sha256(self) -> str:
        """Hexadecimal hash of what was read."""
        return self._digest.hexdigest()

    def read(self, size: int) -> bytes:
        """Return `size` bytes, fewer only at the file's end."""
        data = self._file.read(size)
        while 0 < len(data) < size and (more := self._file.read(size - len(data))):
            data += more  # a stream of HTTP gives what has arrived
        self._digest.update(data)
        self.size_bytes += len(data)
        self.is_at_end |= len(data) < size
        return data


def verify(shards: ShardSet, progress: Progress) -> list[Problem]:
    """Read all files of the set, and return what is not as the manifest and the index say.

    A shard is read once; only one with a wrong hash is read again, and its samples are decoded.
    """
    problems = [each for table in shards.manifest.tables for each in _verify_file(shards, table)]
    is_index_whole = all(problem.file != INDEX_FILE for problem in problems)
    index = shards.read_index() if is_index_whole else None
    files = shards.manifest.shards
    check = partial(_verify_shard, shards, index)
    with (
        progress.stage("verify", sum(file.num_images for file in files)) as bar,
        ThreadPoolExecutor(_NUM_THREADS) as pool,
    ):
        for file, found in zip(files, pool.map(check, files), strict=True):
            problems += found
            bar.update(file.num_images)
    return problems


def find_missing(shards: ShardSet) -> list[str]:
    """Return the files that the manifest names and that are not there, without reading any."""
    names = [file.name for file in shards.manifest.tables]
    names += [file.name for file in shards.manifest.shards]
    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        is_there = pool.map(shards.fs.exists, [shards.path(name) for name in names])
        return [name for name, there in zip(names, is_there, strict=True) if not there]


def _verify_shard(shards: ShardSet, index: pa.Table | None, shard: ShardFile) -> list[Problem]:
    """Compare a shard with the manifest and, unless that is damaged itself, with the index."""
    if index is None:
        return _verify_file(shards, shard)
    rows = index.filter(pc.field("shard") == shard.name)
    problems = _verify_file(shards, shard, rows)
    if rows.num_rows != shard.num_images:
        what = f"holds {rows.num_rows} images by the index, {shard.num_images} by the manifest"
        problems.append(Problem(file=shard.name, what=what))
    return problems


def _members(rows: pa.Table) -> list[_Member]:
    members = [
        _Member(
            kind=kind,
            name=member_name(row["key"], kind, row["image_extension"]),
            offset=row[f"{kind}_offset"],
            size_bytes=row[f"{kind}_size"],
            row=row,
        )
        for row in rows.to_pylist()
        for kind in MEMBER_SUFFIXES
        if row[f"{kind}_offset"] is not None
    ]
    return sorted(members, key=lambda member: member.offset)


def _verify_file(
    shards: ShardSet, expected: ShardFile | TableFile, rows: pa.Table | None = None
) -> list[Problem]:
    """Compare a file with the manifest and, given its rows of the index, with these."""
    name = expected.name
    try:
        # A third faster without the keypoints, which only a look into the samples needs.
        members = [] if rows is None else _members(rows.drop_columns("keypoints"))
        file, found = _read(shards, name, members)
        is_whole = (file.size_bytes, file.sha256) == (expected.size_bytes, expected.sha256)
        if not is_whole and rows is not None:
            _, found = _read(shards, name, _members(rows), decode=True)
    except FileNotFoundError:
        return [Problem(file=name, what="is missing")]
    except (OSError, ValueError, ClientError) as error:  # a store's or a server's refusal
        return [Problem(file=name, what=f"cannot be read: {error}")]
    problems = []
    if file.size_bytes != expected.size_bytes:
        what = f"has {file.size_bytes:,} bytes, by the manifest {expected.size_bytes:,}"
        problems.append(Problem(file=name, what=what))
    elif not is_whole:
        what = f"its sha256 is {file.sha256}, by the manifest {expected.sha256}"
        problems.append(Problem(file=name, what=what))
        if rows is not None and not found:
            what = "no sample can be named: all can be decoded and agree with the index"
            problems.append(Problem(file=name, what=what))
    problems += found[:MAX_PROBLEMS_PER_FILE]
    if len(found) > MAX_PROBLEMS_PER_FILE:
        what = f"{len(found) - MAX_PROBLEMS_PER_FILE:,} more problems like these"
        problems.append(Problem(file=name, what=what))
    return problems


def _read(
    shards: ShardSet, name: str, members: Sequence[_Member], *, decode: bool = False
) -> tuple[_HashedFile, list[Problem]]:
    """Read a file to its end; return its hash and size, and what is wrong with its members."""
    with shards.fs.open(shards.path(name), "rb", block_size=_READ_SIZE_BYTES) as opened:
        file = _HashedFile(opened)
        found = [
            Problem(file=name, key=member.row["key"], what=what)
            for member in members
            for what in _explain_member(file, member, decode)
        ]
        is_end_clean = True
        while block := file.read(_READ_SIZE_BYTES):
            is_end_clean &= not any(block)
        if members and not is_end_clean:
            found.append(Problem(file=name, what="there is more behind the last sample"))
    return file, found


def _explain_member(file: _HashedFile, member: _Member, decode: bool) -> Iterator[str]:
    """Read a member; yield what is wrong with its place, its header and, on request, its content.

    That the file ends too early is said of the first member that is lost.
    """
    if file.is_at_end:
        return
    gap = member.offset - _BLOCK - file.size_bytes
    if gap < 0:
        yield f"{member.name} lies, by the index, inside the member before it"
        return
    start = gap + _BLOCK
    data = file.read(start + member.size_bytes)
    if any(data[:gap]):
        yield f"there is something between {member.name} and the member before it"
    if len(data) < start + member.size_bytes:
        yield f"the file ends before the end of {member.name}; what follows is lost"
        return
    try:
        header = tarfile.TarInfo.frombuf(data[gap:start], "ascii", "replace")
    except tarfile.HeaderError as error:
        yield f"the tar header of {member.name} is damaged ({error})"
    else:
        if (header.name, header.size) != (member.name, member.size_bytes):
            yield f"{header.name} of {header.size:,} bytes lies in the place of {member.name}"
    if decode:
        yield from _explain_content(member, data[start:])


def _explain_content(member: _Member, content: bytes) -> Iterator[str]:
    row = member.row
    if member.kind == "json":
        differing = _differing_fields(content, row)
        if differing is None:
            yield f"{member.name} is no record in JSON"
        elif differing:
            yield f"{member.name} differs from the index in {', '.join(differing)}"
    elif member.kind in ("image", "pose"):
        size = POSE_SIZE if member.kind == "pose" else (row["height"], row["width"])
        try:
            image = decode_image(content)
            with Image.open(io.BytesIO(content)) as opened:
                opened.verify()  # the checksums of a PNG
        except (ImageError, OSError, SyntaxError) as error:
            yield f"{member.name} cannot be decoded ({error})"
        else:
            if image.shape[:2] != size:
                yield f"{member.name} is {image.shape[:2]} pixels high and wide, not {size}"
    else:
        yield from _explain_latent(member.name, content)


def _explain_latent(name: str, content: bytes) -> Iterator[str]:
    try:
        latent = np.load(io.BytesIO(content), allow_pickle=False)
    except (ValueError, EOFError) as error:
        yield f"{name} is no array of numpy ({error})"
        return
    if latent.dtype != np.float16 or latent.ndim != _LATENT_AXES:
        yield f"{name} is {latent.dtype} of shape {list(latent.shape)}, not float16 of three axes"
    elif not np.isfinite(latent).all():
        yield f"{name} holds numbers that are not finite"


def _differing_fields(content: bytes, row: Mapping[str, Any]) -> list[str] | None:
    """Return the fields in which a record is not as its index row; None if it is no record."""
    try:
        record = json.loads(content)
        keypoints = np.array(record["keypoints"], np.float32).ravel()
        simple = [name for name in SAMPLE_FIELDS if name in row and name != "keypoints"]
        differing = [name for name in simple if record[name] != row[name]]
    except (ValueError, KeyError, TypeError):
        return None
    is_equal = np.array_equal(keypoints, np.float32(row["keypoints"]), equal_nan=True)
    return differing if is_equal else [*differing, "keypoints"]
