"""Reads keypoint files into a table and matches their names with those of the photos."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cfld.keypoints import BadRow, ImagePeople, KeypointsError, main_person, read_keypoints
from cfld.pose import MISSING_JOINT
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
NO_KEYPOINTS = np.tile(np.array(MISSING_JOINT, np.float32), NUM_JOINTS)
# The same with the file, and the row if it is a csv, that each comes from.
_LISTED_SCHEMA = KEYPOINTS_SCHEMA.append(pa.field("place", pa.string()))
_NUM_BATCH = 4096


def read_published(
    paths: Sequence[str], frame: tuple[int, int] | None, names: pa.Array, unselected: pa.Array
) -> tuple[pa.Table, pa.Table]:
    """Read keypoints of the photos `names`; return them, and the rejects of what cannot be used.

    Entries for an `unselected` photo are passed over. An entry belongs to the photo of its name, or
    to the only one, selected or not, whose file name, with or without extension, it is. A COCO
    file's numbers need no leading zeros.

    Raises:
        KeypointsError: If none of the files is in a known format.
    """
    batches: list[pa.RecordBatch] = []
    rejects = [rejects_table(())]
    bad: list[Reject] = []
    lookup = _NameLookup(pa.concat_arrays([names, unselected]))
    entries = _read(paths, bad)
    while chunk := list(islice(entries, _NUM_BATCH)):
        rows = [_row(image, frame) | {"place": to_text(place)} for place, image in chunk]
        batch = pa.RecordBatch.from_pylist(rows, _LISTED_SCHEMA)
        found, is_ambiguous = lookup.find(batch["name"])
        is_unknown = pc.and_not(pc.is_null(found), is_ambiguous)
        for reason, mask in (("ambiguous_name", is_ambiguous), ("no_such_image", is_unknown)):
            lost = batch.filter(mask)
            rejects.append(
                rejects_of_columns("keypoints", reason, lost["place"], detail=lost["name"])
            )
        known = pa.RecordBatch.from_arrays([found, *batch.columns[1:]], schema=_LISTED_SCHEMA)
        batches.append(known.filter(pc.is_in(found, names)))
    table, repeated = keep_first(pa.Table.from_batches(batches, _LISTED_SCHEMA))
    detail = pc.binary_join_element_wise(repeated["name"], "the first entry counts", ": ")
    again = rejects_of_columns("keypoints", "listed_twice", repeated["place"], detail=detail)
    return table.drop_columns(["place"]), pa.concat_tables([*rejects, rejects_table(bad), again])


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
        numbers = pc.replace_substring_regex(stems, "^0+([0-9]+)$", r"\1")
        self._names = names
        self._spellings = [(s, _repeated(s)) for s in (names, file_names, stems, numbers)]

    def find(self, listed: pa.Array) -> tuple[pa.Array, pa.Array]:
        """Return the photo name of each listed name, null where there is not one; where several."""
        rows = pa.nulls(len(listed), pa.int32())
        is_ambiguous = pa.repeat(False, len(listed))
        for spelling, repeated in self._spellings:
            is_several = pc.and_(pc.is_null(rows), pc.is_in(listed, repeated))
            is_ambiguous = pc.or_(is_ambiguous, is_several)
            rows = pc.coalesce(rows, pc.if_else(is_ambiguous, None, pc.index_in(listed, spelling)))
        return self._names.take(rows), is_ambiguous


def _repeated(values: pa.Array) -> pa.Array:
    """Return the values that occur more than once."""
    counts = values.value_counts()
    return counts.field("values").filter(pc.greater(counts.field("counts"), 1))


def _read(paths: Sequence[str], bad: list[Reject]) -> Iterator[tuple[str, ImagePeople]]:
    """Yield what the files list with its place; put malformed files and rows into `bad`."""
    num_malformed = 0
    for path in paths:
        entries = read_keypoints(path)
        try:
            for entry in entries:
                place = path if entry.row is None else f"{path}:{entry.row}"
                if isinstance(entry, BadRow):
                    bad.append(_reject(place, "malformed_row", entry.reason))
                else:
                    yield place, entry
        except KeypointsError as error:
            num_malformed += 1
            if num_malformed == len(paths):
                raise
            bad.append(_reject(path, "malformed_file", str(error)))


def _reject(path: str, reason: str, detail: str) -> Reject:
    return Reject(path=path, stage="keypoints", reason=reason, detail=detail)


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
