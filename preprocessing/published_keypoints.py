"""Reads keypoint files into a table and matches their names with those of the photos."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cfld.keypoints import BadRow, ImagePeople, main_person, read_keypoints
from preprocessing.listing import Reject, to_text
from preprocessing.rejects import rejects_of_columns, rejects_table
from shards.format import NUM_JOINTS

# Keypoints by photo name; `reason` says why there are none. They refer to a frame (height, width),
# null: the photo's own.
KEYPOINTS_SCHEMA = pa.schema(
    [
        pa.field("name", pa.string()),
        pa.field("keypoints", pa.list_(pa.float32())),
        pa.field("frame_height", pa.int32()),
        pa.field("frame_width", pa.int32()),
        pa.field("num_people", pa.int32()),
        pa.field("reason", pa.string()),
        pa.field("detail", pa.string()),
    ]
)
NO_KEYPOINTS = np.tile(np.array([np.nan, np.nan, 0], np.float32), NUM_JOINTS)
_NUM_BATCH = 4096


def read_published(
    paths: Iterable[str], frame: tuple[int, int] | None, names: pa.Array, unselected: pa.Array
) -> tuple[pa.Table, pa.Table]:
    """Read keypoints of the photos `names`; return them, and the rejects of what cannot be used.

    Entries for an `unselected` photo are passed over. An entry belongs to the photo of its name, or
    to the only one whose file name, with or without extension, it is.

    Raises:
        KeypointsError: If a file is in no known format.
    """
    batches: list[pa.RecordBatch] = []
    rejects = [rejects_table(())]
    lookup = _NameLookup(names)
    for path in paths:
        bad_rows: list[tuple[Reject, str | None]] = []
        for batch in _read(path, frame, bad_rows):
            listed = batch["name"]
            found = lookup.find(listed)
            is_unknown = pc.and_(pc.is_null(found), pc.invert(pc.is_in(listed, unselected)))
            unknown = listed.filter(is_unknown)
            rejects.append(
                rejects_of_columns(
                    "keypoints", "no_such_image", path, detail=unknown, num_rows=len(unknown)
                )
            )
            known = pa.RecordBatch.from_arrays([found, *batch.columns[1:]], schema=batch.schema)
            batches.append(known.filter(pc.is_valid(found)))
        rejects.append(rejects_table(bad_rows))
    table, repeated = keep_first(pa.Table.from_batches(batches, KEYPOINTS_SCHEMA))
    again = repeated["name"].combine_chunks()
    rejects.append(
        rejects_of_columns(
            "keypoints", "listed_twice", again, detail="the first entry counts", num_rows=len(again)
        )
    )
    return table, pa.concat_tables(rejects)


def keep_first(table: pa.Table) -> tuple[pa.Table, pa.Table]:
    """Split rows by their column `name`: the first of each name, and the others."""
    names = table["name"].combine_chunks()
    is_first = pc.equal(pc.index_in(names, names), pa.array(np.arange(len(names)), pa.int32()))
    if pc.all(is_first).as_py():
        return table, table.slice(0, 0)  # nothing is copied
    return table.filter(is_first), table.filter(pc.invert(is_first))


class _NameLookup:
    """Finds photo names by what keypoint files call them."""

    def __init__(self, names: pa.Array) -> None:
        file_names = pc.replace_substring_regex(names, "^.*/", "")
        stems = pc.replace_substring_regex(file_names, r"\.[^.]*$", "")
        self._names = names
        self._spellings = [names, _unique(file_names), _unique(stems)]

    def find(self, listed: pa.Array) -> pa.Array:
        """Return the photo name of each listed name, null where there is none."""
        rows = pc.coalesce(*(pc.index_in(listed, known) for known in self._spellings))
        return self._names.take(rows)


def _unique(values: pa.Array) -> pa.Array:
    """Set values that occur more than once to null."""
    counts = values.value_counts()
    once = counts.field("values").filter(pc.equal(counts.field("counts"), 1))
    return pc.if_else(pc.is_in(values, once), values, None)


def _read(
    path: str, frame: tuple[int, int] | None, bad_rows: list[tuple[Reject, str | None]]
) -> Iterator[pa.RecordBatch]:
    """Read a file in batches; put its malformed rows into `bad_rows`."""
    entries = iter(read_keypoints(path))
    while chunk := list(islice(entries, _NUM_BATCH)):
        rows = []
        for entry in chunk:
            if isinstance(entry, BadRow):
                reject = Reject(
                    path=f"{path}:{entry.row}",
                    stage="keypoints",
                    reason="malformed_row",
                    detail=entry.reason,
                )
                bad_rows.append((reject, None))
            else:
                rows.append(_row(entry, frame))
        yield pa.RecordBatch.from_pylist(rows, KEYPOINTS_SCHEMA)


def _row(image: ImagePeople, frame: tuple[int, int] | None) -> dict[str, object]:
    main = main_person(image.people, frame)
    height, width = frame or (None, None)
    return {
        "name": to_text(image.name),
        "keypoints": NO_KEYPOINTS if main is None else image.people[main].ravel(),
        "frame_height": height,
        "frame_width": width,
        "num_people": len(image.people),
    }
