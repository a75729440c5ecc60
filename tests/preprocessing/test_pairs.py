"""Pairs: all of a person, none of two persons, and exactly those of the published names."""

import gzip
from itertools import permutations
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from preprocessing.datasets.deepfashion import raw_path
from preprocessing.pairs import (
    explain_unpaired,
    form_pairs,
    make_pairs,
    number_persons,
    read_pair_list,
)

NOBODY = pa.array([], pa.string())


def images_of(rows: list[tuple[str, str, str, bool]]) -> pa.Table:
    """A sorted index of (split, person, name, is_valid)."""
    split, person, name, is_valid = zip(*sorted(rows), strict=True)
    reasons = [None if valid else "too_few_joints" for valid in is_valid]
    return pa.table(
        {
            "split": pa.array(split, pa.string()),
            "person": pa.array(person, pa.string()),
            "name": pa.array(name, pa.string()),
            "path": pa.array([f"/{n}" for n in name]),
            "is_valid": pa.array(is_valid),
            "invalid_reason": pa.array(reasons, pa.string()),
        }
    )


@pytest.fixture
def images() -> pa.Table:
    return images_of(
        [
            ("test", "a", "ta1", True),
            ("test", "a", "ta2", True),
            ("train", "a", "a1", True),
            ("train", "a", "a2", False),
            ("train", "a", "a3", True),
            ("train", "b", "b1", True),
            ("train", "b", "b2", False),
            ("train", "c", "c1", True),
            ("train", "c", "c2", True),
        ]
    )


def names_of(pairs: pa.Table, images: pa.Table) -> list[tuple[str, str]]:
    names = images["name"].to_pylist()
    return [(names[row["source"]], names[row["target"]]) for row in pairs.to_pylist()]


def test_pairs_are_all_permutations_inside_a_person() -> None:
    rng = np.random.default_rng(0)
    person_ids = np.sort(rng.integers(0, 40, 150))
    is_valid = rng.random(150) < 0.7
    expected = [
        pair
        for person in np.unique(person_ids)
        for pair in permutations(np.flatnonzero((person_ids == person) & is_valid).tolist(), 2)
    ]
    pairs = form_pairs(person_ids, is_valid)
    assert pairs.dtype == np.int32
    assert [tuple(pair) for pair in pairs.tolist()] == sorted(expected)


def test_no_valid_image_gives_no_pair() -> None:
    assert form_pairs(np.array([0, 0, 1]), np.zeros(3, bool)).shape == (0, 2)


def test_a_person_of_two_splits_counts_as_two(images: pa.Table) -> None:
    assert number_persons(images).tolist() == [0, 0, 1, 1, 1, 2, 2, 3, 3]
    assert number_persons(images.slice(0, 0)).tolist() == []


def test_pairs_have_row_numbers_and_splits(images: pa.Table) -> None:
    pairs, rejects = make_pairs(images, {}, NOBODY)
    assert names_of(pairs, images) == [
        ("ta1", "ta2"), ("ta2", "ta1"), ("a1", "a3"), ("a3", "a1"), ("c1", "c2"), ("c2", "c1"),
    ]  # fmt: skip
    assert pairs["split"].to_pylist() == ["test"] * 2 + ["train"] * 4
    assert rejects.num_rows == 0


def test_a_published_list_wins_and_its_bad_rows_are_noted(images: pa.Table, tmp_path: Path) -> None:
    path = tmp_path / "pairs.csv"
    path.write_text(
        "from,to\nc2,c1\na1,a2\n\na1\nc1,gone\na1,a1\na1,c1\nc1,elsewhere\nta1,ta2\nc1,c2,c3\n"
    )
    unselected = pa.array(["elsewhere"])
    pairs, rejects = make_pairs(images, {"train": str(path)}, unselected)
    # A listed pair stands although a2 is not valid; the other split keeps the rule.
    assert names_of(pairs, images) == [("ta1", "ta2"), ("ta2", "ta1"), ("c2", "c1"), ("a1", "a2")]
    assert [(row["reason"], row["detail"]) for row in rejects.to_pylist()] == [
        ("malformed_row", "'a1' is not of the form from,to"),
        ("malformed_row", "'c1,c2,c3' is not of the form from,to"),
        ("pair_of_missing_image", "c1,gone"),
        ("pair_of_one_image", "a1,a1"),
        ("pair_of_two_persons", "a1,c1"),
        ("pair_of_missing_image", "ta1,ta2"),
    ]
    rows = [int(place.removeprefix(f"{path}:")) for place in rejects["path"].to_pylist()]
    assert rows == [5, 11, 6, 7, 8, 10]
    assert {row["stage"] for row in rejects.to_pylist()} == {"pairs"}


def test_a_published_list_cannot_pair_junk(images: pa.Table, tmp_path: Path) -> None:
    path = tmp_path / "pairs.csv"
    path.write_text("from,to\na1,a2\nb1,b2\nb2,a1\nc1,c2\n")
    reasons = pc.if_else(pc.is_in(images["name"], pa.array(["b1", "b2"])), "not_pairable", None)
    images = images.drop_columns(["invalid_reason"]).append_column("invalid_reason", reasons)
    pairs, rejects = make_pairs(images, {"train": str(path), "test": str(path)}, NOBODY)
    assert names_of(pairs, images) == [("a1", "a2"), ("c1", "c2")]
    of_train = rejects.filter(pc.equal(rejects["reason"], "pair_of_unpairable"))
    assert of_train["detail"].to_pylist() == ["b1,b2", "b2,a1"]


def test_a_list_may_do_without_header(tmp_path: Path) -> None:
    path = tmp_path / "pairs.csv"
    path.write_text("a,b\n")
    assert read_pair_list(str(path)).sources.to_pylist() == ["a"]


def test_every_stored_image_in_no_pair_has_its_reason(images: pa.Table, tmp_path: Path) -> None:
    pairs, _ = make_pairs(images, {}, NOBODY)
    unpaired = explain_unpaired(images, pairs).to_pylist()
    assert [(row["name"], row["reason"]) for row in unpaired] == [
        ("a2", "too_few_joints"), ("b1", "single_image"), ("b2", "too_few_joints"),
    ]  # fmt: skip
    assert all(row["is_stored"] and row["path"] == f"/{row['name']}" for row in unpaired)
    path = tmp_path / "pairs.csv"
    path.write_text("from,to\na1,a3\n")
    pairs, _ = make_pairs(images, {"train": str(path)}, NOBODY)
    reasons = {r["name"]: r["reason"] for r in explain_unpaired(images, pairs).to_pylist()}
    assert reasons["c1"] == reasons["c2"] == "not_in_pair_list"


@pytest.mark.parametrize(("split", "num_pairs"), [("train", 154_758), ("test", 12_860)])
def test_the_published_names_give_the_published_pairs(
    shared_dir: Path, split: str, num_pairs: int
) -> None:
    """Counts of the ordered pairs without a keypoint filter, from the lists' own README."""
    packed = (shared_dir / f"data/deepfashion/{split}.lst.gz").read_bytes()
    text = gzip.decompress(packed).decode()
    names = [name for name in text.split() if raw_path(name)]
    images = images_of([(split, name.rpartition("_")[0], name, True) for name in names])
    pairs, _ = make_pairs(images, {}, NOBODY)
    assert pairs.num_rows == num_pairs
