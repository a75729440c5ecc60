"""Writes one shard: a tar by webdataset's own writer, the same bytes whoever writes it and when."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from tarfile import BLOCKSIZE
from typing import Any

import pyarrow as pa
import webdataset
from fsspec.implementations.local import LocalFileSystem

from preprocessing.store import Store
from shards.format import ShardFile, sha256_of


class ShardWriter:
    """An open shard, which tells where each member's content lies."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("wb")
        # A time that is no whole number would add a block of extended attributes to every member.
        self._tar = webdataset.TarWriter(
            self._file, user="", group="", mode=0o644, mtime=0, encoder=False
        )

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, name: str, data: bytes) -> tuple[int, int]:
        """Append a member; return the byte where its content begins, and its length."""
        key, extension = name.split(".", 1)
        self._tar.write({"__key__": key, extension: data})
        padded = -(-len(data) // BLOCKSIZE) * BLOCKSIZE
        return self._tar.tarstream.offset - padded, len(data)

    def finish(self, name: str, split: str, num_images: int) -> ShardFile:
        """Write the end of the archive; describe the shard for the manifest."""
        self._tar.close()
        self._file.close()
        return ShardFile(
            name=name,
            split=split,
            num_images=num_images,
            size_bytes=self._path.stat().st_size,
            sha256=sha256_of(LocalFileSystem(), str(self._path)),
        )


def write_record(
    store: Store, name: str, rows: Sequence[dict[str, Any]], schema: pa.Schema, shard: ShardFile
) -> None:
    """Write a finished shard's index rows, which say that it is done and describe it."""
    described = schema.with_metadata({"shard": json.dumps(asdict(shard))})
    store.write_table(name, pa.Table.from_pylist(rows, described))


def shard_of_record(record: pa.Table) -> ShardFile:
    """Return the description of a finished shard that its record carries."""
    return ShardFile(**json.loads(record.schema.metadata[b"shard"]))
