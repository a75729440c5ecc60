"""Forms the pairs: all ordered ones inside a person, or a published list's."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import dataclass

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Bool, Int

from preprocessing.listing import Reject
from preprocessing.rejects import rejects_of_columns, rejects_table
from shards.format import PAIRS_SCHEMA

UNPAIRABLE = "not_pairable"  # why an image of a junk or distractor identity is not valid


@dataclass(frozen=True)
class PairList:
    """A published list, as photo names with their places, and the rejects of its malformed rows."""

    sources: pa.Array
    targets: pa.Array
    places: pa.Array
    rejects: pa.Table


def number_persons(images: pa.Table) -> Int[np.ndarray, " images"]:
    """Give the images of one person in one split one number; `images` is sorted by both."""
    last = images.num_rows - 1
    if last < 0:
        return np.zeros(0, np.int64)
    is_new = np.zeros(last, bool)
    for name in ("split", "person"):
        values = images[name].combine_chunks()
        differs = pc.not_equal(values.slice(1), values.slice(0, last))
        is_new |= differs.to_numpy(zero_copy_only=False)
    return np.concatenate([[0], np.cumsum(is_new)])


def form_pairs(
    person_ids: Int[np.ndarray, " images"], is_valid: Bool[np.ndarray, " images"]
) -> Int[np.ndarray, "pairs 2"]:
    """Return all ordered pairs (source, target) of different valid images of one person, sorted.

    Images of one id must be neighbours; pairs hold their row numbers.
    """
    rows = np.flatnonzero(is_valid)
    _, starts, sizes = np.unique(person_ids[rows], return_index=True, return_counts=True)
    blocks = [np.zeros((0, 2), np.int32)]
    for size in np.unique(sizes[sizes > 1]):
        members = rows[starts[sizes == size][:, None] + np.arange(size)]  # [persons, size]
        source, target = np.nonzero(~np.eye(size, dtype=bool))
        pairs = np.stack([members[:, source], members[:, target]], axis=-1)
        blocks.append(pairs.reshape(-1, 2).astype(np.int32))
    pairs = np.concatenate(blocks)
    return pairs[np.lexsort((pairs[:, 1], pairs[:, 0]))]


def read_pair_list(path: str) -> PairList:
    """Read a csv of photo names with the columns `from` and `to`, as published with PATN."""
    sources: list[str] = []
    targets: list[str] = []
    places: list[str] = []
    rejects = []
    with fsspec.open(path, "rt", encoding="utf-8-sig", errors="replace", newline="") as lines:
        for number, row in enumerate(csv.reader(lines), 1):
            names, place = [cell.strip() for cell in row], f"{path}:{number}"
            if number == 1 and names == ["from", "to"]:
                continue
            if len(names) == 2 and all(names):
                sources.append(names[0])
                targets.append(names[1])
                places.append(place)
            elif any(names):
                rejects.append(
                    Reject(
                        path=place,
                        stage="pairs",
                        reason="malformed_row",
                        detail=f"{','.join(row)[:200]!r} is not of the form from,to",
                    )
                )
    return PairList(
        sources=pa.array(sources, pa.string()),
        targets=pa.array(targets, pa.string()),
        places=pa.array(places, pa.string()),
        rejects=rejects_table(rejects),
    )


def find_listed_pairs(
    listed: PairList, images: pa.Table, unselected: pa.Array
) -> tuple[Int[np.ndarray, "pairs 2"], pa.Table]:
    """Look up the rows of `images` that a list names; what cannot be a pair comes as rejects.

    Both images must be stored and show one person who is neither junk nor a distractor, which keeps
    a pair inside one shard. Pairs with an `unselected` name are passed over: they were not asked
    for. `images` needs the columns `name, person, split, invalid_reason`.
    """
    sides = (listed.sources, listed.targets)
    names = images["name"].combine_chunks()
    pairs = np.stack([_find(side, names) for side in sides], axis=-1).astype(np.int32)
    is_junk = pc.fill_null(pc.equal(images["invalid_reason"], UNPAIRABLE), False).to_numpy()
    faults = {
        "pair_of_missing_image": (pairs < 0).any(axis=1),
        "pair_of_unpairable": is_junk[pairs].any(axis=1),
        "pair_of_two_persons": np.ptp(number_persons(images)[pairs], axis=1) > 0,
        "pair_of_one_image": pairs[:, 0] == pairs[:, 1],
    }
    reasons = np.select(list(faults.values()), list(faults), "")
    is_pair = reasons == ""
    is_reject = ~is_pair & ~np.any([_find(side, unselected) >= 0 for side in sides], axis=0)
    mask = pa.array(is_reject)
    rejects = rejects_of_columns(
        "pairs",
        pa.array(reasons[is_reject].tolist(), pa.string()),
        listed.places.filter(mask),
        detail=pc.binary_join_element_wise(*(side.filter(mask) for side in sides), ","),
    )
    return pairs[is_pair], rejects


def make_pairs(
    images: pa.Table, lists: Mapping[str, str], unselected: pa.Array
) -> tuple[pa.Table, pa.Table]:
    """Make the pairs and rejects of a sorted index; splits with a published list take that list's.

    `images` needs the columns `name, person, split, is_valid, invalid_reason`; `lists` maps a split
    to a csv.
    """
    person_ids, is_valid = number_persons(images), images["is_valid"].to_numpy()
    tables, rejects = [PAIRS_SCHEMA.empty_table()], []
    for split in sorted(images["split"].unique().to_pylist()):
        is_in_split = pc.equal(images["split"], split).to_numpy()
        if split in lists:
            first = int(np.argmax(is_in_split))
            part = images.slice(first, int(is_in_split.sum()))
            listed = read_pair_list(lists[split])
            pairs, unusable = find_listed_pairs(listed, part, unselected)
            pairs += np.int32(first)
            rejects += [listed.rejects, unusable]
        else:
            pairs = form_pairs(person_ids, is_valid & is_in_split)
        columns = [pairs[:, 0], pairs[:, 1], pa.repeat(split, len(pairs))]
        tables.append(pa.table(columns, schema=PAIRS_SCHEMA))
    return pa.concat_tables(tables), pa.concat_tables([rejects_table(()), *rejects])


def explain_unpaired(images: pa.Table, pairs: pa.Table) -> pa.Table:
    """Make the rejects of the stored images that are in no pair.

    `images` needs the columns `path, name, person, split, is_valid, invalid_reason`, the last one
    null where an image is valid.
    """
    is_unpaired = np.ones(images.num_rows, bool)
    for side in ("source", "target"):
        is_unpaired[pairs[side].to_numpy()] = False
    person_ids = number_persons(images)
    num_valid = np.bincount(person_ids, weights=images["is_valid"].to_numpy(), minlength=1)
    is_alone = num_valid[person_ids[is_unpaired]] < 2
    unpaired = images.filter(pa.array(is_unpaired))
    valid_reasons = pc.if_else(pa.array(is_alone), "single_image", "not_in_pair_list")
    return rejects_of_columns(
        "pairs",
        pc.coalesce(unpaired["invalid_reason"], valid_reasons),
        unpaired["path"],
        name=unpaired["name"],
        is_stored=True,
    )


def _find(names: pa.Array, among: pa.Array) -> Int[np.ndarray, " names"]:
    """Return where each name stands among others, -1 where it does not."""
    return pc.fill_null(pc.index_in(names, among), -1).to_numpy(zero_copy_only=False)
