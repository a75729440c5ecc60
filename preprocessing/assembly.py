"""Puts the finished shards' records together: index, pairs, rejects, and last the manifest."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem

from preprocessing.job_settings import JobSettings
from preprocessing.listing_stage import PhotoListing
from preprocessing.pairs import explain_unpaired, make_pairs, number_persons
from preprocessing.rejects import count_reasons
from preprocessing.shard_stage import record_file, rejects_file
from preprocessing.shard_writer import shard_of_record
from preprocessing.store import Store
from shards.format import (
    INDEX_FILE,
    INDEX_SCHEMA,
    MANIFEST_FILE,
    PAIRS_FILE,
    REJECTS_FILE,
    Manifest,
    ShardFile,
    SplitCounts,
    TableFile,
    sha256_of,
)

_PAIRING_COLUMNS = ["path", "name", "person", "split", "is_valid", "invalid_reason"]


class NoImagesError(RuntimeError):
    """Every photo was left out; there is no set without an image."""


def assemble(
    store: Store,
    shard_names: Sequence[str],
    settings: JobSettings,
    listing: PhotoListing,
    keypoint_rejects: pa.Table,
) -> Manifest:
    """Write the tables and the manifest of a set whose shards are all there.

    Raises:
        NoImagesError: If they hold no image. Nothing is left, so that the next start begins anew.
    """
    index_file, images, shards = _write_index(store, shard_names)
    pairs, pair_rejects = make_pairs(images, settings.pairs or {}, listing.unselected)
    rejects = pa.concat_tables(
        [
            listing.rejects,
            keypoint_rejects,
            *(store.read_table(rejects_file(name)) for name in shard_names),
            pair_rejects,
            explain_unpaired(images, pairs),
        ]
    )
    reasons = count_reasons(rejects)
    if not images.num_rows:
        for name in [*shard_names, INDEX_FILE]:
            store.remove(name)
        store.remove_work()
        counts = ", ".join(f"{count:,} {reason}" for reason, count in reasons.items())
        raise NoImagesError(
            f"{settings.root}: no image could be stored, all were left out: {counts}"
        )
    manifest = Manifest(
        dataset=settings.dataset,
        input_sha256=listing.sha256,
        settings=settings.record(),
        counts=_count(images, pairs),
        rejects=reasons,
        shards=tuple(shards),
        tables=(
            index_file,
            write_rows(store, PAIRS_FILE, [pairs]),
            write_rows(store, REJECTS_FILE, [rejects]),
        ),
    )
    store.write_bytes(MANIFEST_FILE, manifest.to_json().encode())
    return manifest


def write_rows(
    store: Store, name: str, tables: Iterable[pa.Table], schema: pa.Schema | None = None
) -> TableFile:
    """Write tables of one schema one after the other as one parquet file, and describe it."""
    num_rows = 0
    with store.new_file(name) as path:
        writer = None
        for table in tables:
            writer = writer or pq.ParquetWriter(path, schema or table.schema, compression="zstd")
            writer.write_table(table)
            num_rows += table.num_rows
        assert writer is not None  # a job without shards ends before
        writer.close()
        digest = sha256_of(LocalFileSystem(), str(path))
        size_bytes = path.stat().st_size
    return TableFile(name=name, num_rows=num_rows, size_bytes=size_bytes, sha256=digest)


def _write_index(
    store: Store, shard_names: Sequence[str]
) -> tuple[TableFile, pa.Table, list[ShardFile]]:
    """Stream the records into the index; return what pairs need of it, and the shards."""
    kept: list[pa.Table] = []
    shards: list[ShardFile] = []

    def records() -> Iterable[pa.Table]:
        for name in shard_names:
            record = store.read_table(record_file(name))
            kept.append(record.select(_PAIRING_COLUMNS).replace_schema_metadata())
            shards.append(shard_of_record(record))
            yield record.select(INDEX_SCHEMA.names).replace_schema_metadata()

    index_file = write_rows(store, INDEX_FILE, records(), INDEX_SCHEMA)
    return index_file, pa.concat_tables(kept).combine_chunks(), shards


def _count(images: pa.Table, pairs: pa.Table) -> dict[str, SplitCounts]:
    person_ids, is_valid = number_persons(images), images["is_valid"].to_numpy()
    counts = {}
    for split in sorted(images["split"].unique().to_pylist()):
        is_in_split = pc.equal(images["split"], split).to_numpy()
        counts[split] = SplitCounts(
            images=int(is_in_split.sum()),
            persons=len(np.unique(person_ids[is_in_split])),
            valid=int((is_in_split & is_valid).sum()),
            pairs=int(pc.sum(pc.equal(pairs["split"], split)).as_py() or 0),
        )
    return counts
