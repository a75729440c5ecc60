"""The plan: whole persons, about one size, keys that any tar reader understands."""

import re
import string

import numpy as np
import pyarrow as pa
import pytest

from preprocessing.shard_plan import (
    estimate_bytes,
    group_starts,
    make_key,
    plan_shards,
    sample_groups,
)
from shards.format import MAX_KEY_LENGTH


def photos_of(sizes: dict[str, list[int]], *, is_pairable: bool = True) -> pa.Table:
    """A sorted listing: per split the number of photos of each person."""
    rows = [
        (split, f"p{person:04d}", f"{split}-p{person:04d}-{image}")
        for split, persons in sorted(sizes.items())
        for person, count in enumerate(persons)
        for image in range(count)
    ]
    split, person, name = zip(*rows, strict=True)
    columns = {"split": split, "person": person, "name": name}
    return pa.table({**columns, "is_pairable": [is_pairable] * len(rows)})


@pytest.fixture
def photos() -> pa.Table:
    rng = np.random.default_rng(3)
    sizes = {"train": rng.integers(1, 9, 80).tolist(), "test": rng.integers(1, 5, 20).tolist()}
    return photos_of(sizes)


def test_shards_cover_all_photos_in_order_with_whole_persons(photos: pa.Table) -> None:
    shards = list(plan_shards(photos, np.full(photos.num_rows, 10.0), 200))
    assert [shard.start for shard in shards] == [0, *(shard.stop for shard in shards[:-1])]
    assert shards[-1].stop == photos.num_rows
    places: dict[tuple[str, str], set[str]] = {}
    for shard in shards:
        rows = photos.slice(shard.start, shard.num_photos).to_pylist()
        assert {row["split"] for row in rows} == {shard.split}
        for row in rows:
            places.setdefault((row["split"], row["person"]), set()).add(shard.name)
    assert all(len(names) == 1 for names in places.values())
    for split in ("train", "test"):
        numbers = [shard.number for shard in shards if shard.split == split]
        assert numbers == list(range(len(numbers)))


def test_shards_are_full_but_not_overfull(photos: pa.Table) -> None:
    shards = [s for s in plan_shards(photos, np.full(photos.num_rows, 10.0), 200) if s.number]
    assert all(120 < 10 * shard.num_photos <= 200 for shard in shards[1:-1])


def test_a_person_larger_than_a_shard_has_its_own() -> None:
    photos = photos_of({"train": [2, 30, 2]})
    shards = list(plan_shards(photos, np.full(34, 10.0), 100))
    assert [(shard.start, shard.stop) for shard in shards] == [(0, 2), (2, 32), (32, 34)]


def test_photos_that_form_no_pairs_may_be_spread() -> None:
    photos = photos_of({"train": [100]}, is_pairable=False)
    assert len(list(plan_shards(photos, np.full(100, 10.0), 100))) == 10
    assert group_starts(photos).tolist() == list(range(100))


def test_a_person_some_of_whose_photos_are_unpairable_stays_whole() -> None:
    photos = photos_of({"train": [3, 3]}).drop_columns(["is_pairable"])
    photos = photos.append_column("is_pairable", pa.array([True, False, True, False, True, True]))
    assert group_starts(photos).tolist() == [0, 3]


def test_nothing_gives_no_shard() -> None:
    empty = photos_of({"train": [1]}).slice(0, 0)
    assert list(plan_shards(empty, np.zeros(0), 100)) == []


def test_estimates_grow_with_the_image() -> None:
    assert estimate_bytes((64, 64)) < estimate_bytes((256, 176)) < estimate_bytes((512, 512))


def test_a_sample_is_whole_persons_of_the_seed(photos: pa.Table) -> None:
    sample = sample_groups(photos, 50, seed=0)
    assert 42 <= sample.num_rows <= 50
    assert sample.equals(sample_groups(photos, 50, seed=0))
    assert not sample.equals(sample_groups(photos, 50, seed=1))
    kept = set(zip(sample["split"].to_pylist(), sample["person"].to_pylist(), strict=True))
    whole = [r for r in photos.to_pylist() if (r["split"], r["person"]) in kept]
    assert sample.to_pylist() == whole


def test_a_sample_has_at_least_one_person_and_at_most_all(photos: pa.Table) -> None:
    assert len(sample_groups(photos_of({"train": [5, 5]}), 1, seed=0)) == 5
    assert sample_groups(photos, 10**6, seed=0).equals(photos)


ODD_NAMES = [
    "a.jpg", "a.png", "a.JPG", "a.1.jpg", "a_1.jpg", "a/1.jpg", "a 1.jpg", "ä.jpg",
    "a-0123456789.jpg",
    "p/" + "x" * 200 + ".jpg", "x" * 81 + ".jpg", ".jpg", "..jpg", "a", "train/p/a.jpg", "a\n.jpg",
    "a_" + make_key("a.png")[2:] + ".jpg", make_key("a.png") + ".jpg",
]  # fmt: skip


def test_keys_are_plain_short_and_unique() -> None:
    keys = [make_key(name) for name in ODD_NAMES]
    assert len(set(keys)) == len(keys)
    allowed = set(string.ascii_letters + string.digits + "_-")
    assert all(0 < len(key) <= MAX_KEY_LENGTH and set(key) <= allowed for key in keys)


def test_a_plain_name_is_its_own_key() -> None:
    name = "fashionWOMENTees_Tanksid0000783805_7additional"
    assert make_key(f"{name}.jpg") == name
    assert re.fullmatch("train_p_01-[0-9a-f]{10}", make_key("train/p/01.png"))
