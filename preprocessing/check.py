"""Says what of a dataset is there and what is missing, beside the published counts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import fsspec

from preprocessing.job_settings import explain
from preprocessing.listing import Annotations, Dataset, Reject
from preprocessing.pairs import read_pair_list


@dataclass(frozen=True, kw_only=True)
class Findings:
    """The report of `build_shards --check`, and how many images there are; 0 if none was found."""

    report: str
    num_images: int


@dataclass
class _Listing:
    """What `list_photos` gave: image names by split, images per pairable person, rejects."""

    names: dict[str, set[str]] = field(default_factory=dict)
    persons: dict[str, Counter[str]] = field(default_factory=dict)
    rejects: Counter[str] = field(default_factory=Counter)
    examples: dict[str, Reject] = field(default_factory=dict)


def check(dataset: Dataset, root: str) -> Findings:
    """Look at a dataset. Reads names and csv files, writes nothing.

    A piece that is missing is a line of the report, not an error.
    """
    listing, problems = _Listing(), []
    counts: dict[str, int] = {}
    try:
        listing = _list(dataset, root)
        counts = _count_photos(listing)
    except (OSError, ValueError) as error:
        problems.append(f"The images were not counted. {explain(error)}")
    notes = [_describe_rejects(listing, reason) for reason in sorted(listing.rejects)]
    try:
        annotations = dataset.find_annotations(root)
    except OSError:  # no root, or none that can be read: said above
        annotations = Annotations()
    if dataset.expected and not annotations.keypoints:
        notes.append("published keypoints: none here; the pose network finds them")
    notes += [
        f"published keypoints: {_count_rows(path):,} in {path}" for path in annotations.keypoints
    ]
    for split, path in annotations.pairs.items():
        listed = read_pair_list(path)
        counts[f"{split} published pairs"] = len(listed.sources)
        sides = listed.sources.to_pylist(), listed.targets.to_pylist()
        names = listing.names.get(split, set())
        if absent := sum(not names.issuperset(pair) for pair in zip(*sides, strict=True)):
            notes.append(f"published pairs: {absent:,} of {path} name an image that is not there")
        if listed.rejects:
            notes.append(f"published pairs: {len(listed.rejects):,} rows of {path} are malformed")
    if dataset.access not in "".join(problems):
        problems.append(dataset.access)
    table = _table(counts, dataset.expected)
    sections = [[f"Found in {root}:"], table, notes, *([problem] for problem in problems)]
    report = "\n\n".join("\n".join(section) for section in sections if section) + "\n"
    return Findings(report=report, num_images=counts.get("images", 0))


def _describe_rejects(listing: _Listing, reason: str) -> str:
    first = listing.examples[reason]
    example = f"{first.path} {first.detail}".rstrip()
    return f"left out as {reason}: {listing.rejects[reason]:,}, the first is {example}"


def _list(dataset: Dataset, root: str) -> _Listing:
    listing = _Listing()
    for item in dataset.list_photos(root):
        if isinstance(item, Reject):
            listing.rejects[item.reason] += 1
            listing.examples.setdefault(item.reason, item)
        else:
            listing.names.setdefault(item.split, set()).add(item.name)
            persons = listing.persons.setdefault(item.split, Counter())
            if item.is_pairable:
                persons[item.person] += 1
    return listing


def _count_photos(listing: _Listing) -> dict[str, int]:
    """Count under the names that `Dataset.expected` uses."""
    counts = {"images": sum(map(len, listing.names.values()))}
    for split, persons in listing.persons.items():
        counts |= {
            f"{split} images": len(listing.names[split]),
            f"{split} images without a person to pair": len(listing.names[split]) - persons.total(),
            f"{split} persons": len(persons),
            f"{split} persons with a single image": sum(n == 1 for n in persons.values()),
            f"{split} pairs before the keypoint filter": sum(n * (n - 1) for n in persons.values()),
        }
    return counts


def _count_rows(path: str) -> int:
    """Count the rows of a csv below its header."""
    with fsspec.open(path, "rt", encoding="utf-8", errors="replace") as lines:
        return max(0, sum(1 for line in lines if line.strip()) - 1)


def _table(counts: Mapping[str, int], expected: Mapping[str, int]) -> list[str]:
    """Lay out found and published counts, in the order of the published ones."""
    if not counts and not expected:
        return []
    rows = [("", "found", "published" if expected else "", "")]
    for name in [*expected, *(name for name in counts if name not in expected)]:
        found, published = counts.get(name), expected.get(name)
        if found == 0 and published is None:
            continue
        rows.append(
            (
                name,
                _number(found),
                _number(published) if expected else "",
                _verdict(found, published),
            )
        )
    width = max(len(row[0]) for row in rows)
    return [f"{row[0]:{width}} {row[1]:>11} {row[2]:>11}  {row[3]}".rstrip() for row in rows]


def _number(count: int | None) -> str:
    return "-" if count is None else f"{count:,}"


def _verdict(found: int | None, published: int | None) -> str:
    if published is None or found == published:
        return "" if published is None else "complete"
    if found is None:
        return "missing"
    return f"{published - found:,} missing" if found < published else f"{found - published:,} more"
