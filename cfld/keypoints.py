"""Readers of published keypoints: PATN csv, OpenPose JSON, COCO-17 JSON.

Whatever the format, people come as float32 `[people, 18, 3]` (x, y, score) in the order of
`cfld.pose.JOINT_NAMES`, in the pixels of the frame that the file was made for, missing joints as
NaN, NaN, 0. A format without scores gives 1.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
from jaxtyping import Float, Float32

from cfld.pose import NUM_JOINTS, is_found, mark_missing

PATN_HEADER = "name:keypoints_y:keypoints_x"
OPENPOSE_KEYS = ("pose_keypoints_2d", "pose_keypoints")  # the second in OpenPose's first versions

# Where each of our 18 joints stands in the other formats.
BODY_25_ORDER = (0, 1, 2, 3, 4, 5, 6, 7, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18)
COCO_17_ORDER = (0, None, 6, 8, 10, 5, 7, 9, 12, 14, 16, 11, 13, 15, 2, 1, 4, 3)
_NECK, _RIGHT_SHOULDER, _LEFT_SHOULDER = 1, 2, 5
_LARGEST = float(np.finfo(np.float32).max)


class KeypointsError(ValueError):
    """A keypoint file that cannot be used; the message names file, place and remedy."""


@dataclass(frozen=True)
class ImagePeople:
    """The people that a file lists for one image; at least one joint of each is found.

    `row` is the csv's, None for other formats.
    """

    name: str
    people: Float32[np.ndarray, "people 18 3"]
    row: int | None = None


@dataclass(frozen=True)
class BadRow:
    """A row (a csv's header is row 1) or annotation (from 1) that was left out, and why."""

    row: int
    reason: str


def read_pose(spec: str) -> Float32[np.ndarray, "18 3"]:
    """Read one person from `FILE.json`, `FILE.json:NAME` or `FILE.csv:NAME`.

    The format is told by content. NAME is the image's name (in COCO files without an image list
    its id); it may be left out if the file holds one image. Of several people: `main_person`.

    Raises:
        KeypointsError: If the file is malformed, the name is not in it, or it holds no person.
    """
    path, _, name = spec, "", ""
    if not Path(spec).exists() and (match := re.fullmatch(r"(.+?\.(?:csv|json)):(.+)", spec, re.I)):
        path, name = match.groups()
    images, bad_rows = [], []
    for entry in read_keypoints(path):
        if isinstance(entry, BadRow):
            bad_rows.append(entry)
        elif not name or entry.name == name:
            images.append(entry)
            if name or len(images) > 1:
                break
    if len(images) > 1:
        raise KeypointsError(
            f"{path}: holds several images; say which one: {path}:{images[0].name}"
        )
    if not images:
        raise KeypointsError(f"{path}: {_why_nothing(name, bad_rows)}")
    people = images[0].people
    main = main_person(people)
    if main is None:
        raise KeypointsError(f"{spec}: lists no person with any joint; give another pose")
    return people[main]


def read_keypoints(path: str | Path) -> Iterator[ImagePeople | BadRow]:
    """Read any supported file (local path or fsspec URL), its format told by content.

    A csv is streamed row by row. An OpenPose file is one image, named after the file without
    `_keypoints.json`.

    Raises:
        KeypointsError: If the file is in none of the formats or breaks its own.
    """
    # Names that are no UTF-8 keep their bytes, as Python's file functions do it.
    with fsspec.open(str(path), "rt", encoding="utf-8-sig", errors="surrogateescape") as file:
        try:
            first = file.readline()
            if first.strip().replace(" ", "") == PATN_HEADER:
                yield from _parse_patn(file)
                return
            content = json.loads(first + file.read())
        except (ValueError, RecursionError) as error:
            raise KeypointsError(
                f"{path}: neither a csv with the header {PATN_HEADER!r} nor JSON ({error})"
            ) from error
    if isinstance(content, Mapping) and "people" in content:
        name = re.sub(r"(_keypoints)?\.json$", "", str(path).rpartition("/")[2], flags=re.I)
        yield ImagePeople(name, _parse_openpose(content, path))
    elif isinstance(content, list) or (isinstance(content, Mapping) and "annotations" in content):
        yield from _parse_coco(content, path)
    else:
        raise KeypointsError(
            f"{path}: has no key 'people' (OpenPose) and no key 'annotations' (COCO), and is no "
            "list of COCO results; export it in one of these formats"
        )


def main_person(
    people: Float[np.ndarray, "people 18 3"], image_size: tuple[int, int] | None = None
) -> int | None:
    """Choose the person a photo is of: confident, large and, if the size is known, central.

    Maximises the sum of joint scores × diagonal of the joints' box × (1 - distance of the box's
    centre from the image's centre / half the image's diagonal). None if nobody has a joint.
    """
    best, best_prominence = None, -1.0
    for index, person in enumerate(people):
        points = person[is_found(person), :2]
        if not len(points):
            continue
        low, high = points.min(axis=0), points.max(axis=0)
        prominence = float(person[is_found(person), 2].sum() * (1 + np.linalg.norm(high - low)))
        if image_size is not None:
            centre = (np.array(image_size[::-1]) - 1) / 2
            offset = np.linalg.norm((low + high) / 2 - centre)
            prominence *= max(0.0, 1 - float(offset / np.linalg.norm(centre + 0.5)))
        if prominence > best_prominence:
            best, best_prominence = index, prominence
    return best


def midpoint(
    people: Float[np.ndarray, "*people 18 3"], joint_a: int, joint_b: int
) -> Float[np.ndarray, "*people 3"]:
    """The middle of two joints with the lower of their scores, missing if either is."""
    a, b = people[..., joint_a, :], people[..., joint_b, :]
    return np.concatenate(((a + b)[..., :2] / 2, np.minimum(a, b)[..., 2:]), axis=-1)


def _parse_patn(lines: Iterable[str]) -> Iterator[ImagePeople | BadRow]:
    for row, line in enumerate(lines, start=2):
        if not line.strip():
            continue
        try:
            name, *columns = (part.strip(' "\r\n') for part in line.rsplit(":", 2))
            if len(columns) != 2 or not name:
                raise ValueError("is not of the form 'name: [y, ...]: [x, ...]'")
            y, x = (_numbers(json.loads(column), NUM_JOINTS) for column in columns)
            if any((axis[axis < 0] != -1).any() for axis in (x, y)):
                raise ValueError("has a negative coordinate other than -1 (missing)")
            points = np.column_stack((x, y, (x >= 0) & (y >= 0)))
        except (ValueError, RecursionError) as error:
            yield BadRow(row, str(error))
        else:
            yield ImagePeople(name, _with_joints(mark_missing(points)[None]), row)


def _parse_openpose(
    content: Mapping[str, Any], path: str | Path
) -> Float32[np.ndarray, "people 18 3"]:
    people: list[np.ndarray] = []
    try:
        for index, entry in enumerate(_list_of(Mapping, content["people"], "people")):
            key = next((key for key in OPENPOSE_KEYS if key in entry), None)
            if key is None:
                raise ValueError(
                    f"people[{index}]: has neither of the keys {', '.join(OPENPOSE_KEYS)}; run "
                    "OpenPose with its body network"
                )
            try:
                people.append(_openpose_points(entry[key]))
            except ValueError as error:
                raise ValueError(f"people[{index}].{key}: {error}") from error
    except ValueError as error:
        raise KeypointsError(f"{path}: {error}") from error
    return _with_joints(np.array(people, dtype=np.float32).reshape(-1, NUM_JOINTS, 3))


def _openpose_points(values: Any) -> Float32[np.ndarray, "18 3"]:
    points = _numbers(values, 3 * 18, 3 * 25).reshape(-1, 3)
    if len(points) == 25:
        points = points[list(BODY_25_ORDER)]
    return _in_pixels(mark_missing(points))


def _parse_coco(content: Any, path: str | Path) -> Iterator[ImagePeople | BadRow]:
    """Group annotations (v: 0 missing, 1 hidden, 2 visible) or results (score) by image."""
    is_results = isinstance(content, list)
    try:
        entries = content if is_results else _list_of(object, content["annotations"], "annotations")
        images = [] if is_results else _list_of(Mapping, content.get("images", []), "images")
        names = {image["id"]: str(image["file_name"]) for image in images}
    except KeyError as error:
        raise KeypointsError(f"{path}: an entry of 'images' has no key {error}") from error
    except (TypeError, ValueError) as error:
        raise KeypointsError(f"{path}: {error}") from error
    people: dict[Any, list[np.ndarray]] = {image_id: [] for image_id in names}
    for number, entry in enumerate(entries, start=1):
        person = _coco_person(entry, is_results)
        if isinstance(person, str):
            yield BadRow(number, person)
        else:
            people.setdefault(person[0], []).append(person[1])
    for image_id, listed in people.items():
        points = np.array(listed, dtype=np.float32).reshape(-1, NUM_JOINTS, 3)
        yield ImagePeople(names.get(image_id, str(image_id)), _with_joints(points))


def _coco_person(entry: Any, is_scored: bool) -> tuple[Any, Float32[np.ndarray, "18 3"]] | str:
    """Image id and joints of an annotation, or what is wrong with it."""
    try:
        points = _numbers(entry["keypoints"], 3 * 17).reshape(17, 3)
        if not isinstance(entry["image_id"], int | str):
            raise ValueError("image_id is neither a number nor a name")
        return entry["image_id"], _coco_points(points, is_scored)
    except KeyError as error:
        return f"has no key {error}"
    except (TypeError, ValueError) as error:
        return str(error)


def _coco_points(points: Float[np.ndarray, "17 3"], is_scored: bool) -> Float32[np.ndarray, "18 3"]:
    """Reorder to our joints; the neck is the middle of the shoulders, missing without both."""
    if not is_scored:
        points = np.column_stack((points[:, :2], points[:, 2] > 0))
    ours = np.array([points[joint or 0] for joint in COCO_17_ORDER])
    ours[_NECK] = 0
    ours = _in_pixels(mark_missing(ours))
    ours[_NECK] = midpoint(ours, _RIGHT_SHOULDER, _LEFT_SHOULDER)
    return ours


def _numbers(values: Any, *lengths: int) -> Float[np.ndarray, " numbers"]:
    if not isinstance(values, list) or len(values) not in lengths:
        size = f"{len(values)} values" if isinstance(values, list) else "no list"
        raise ValueError(f"{size}, expected {' or '.join(map(str, lengths))}")
    if not all(isinstance(value, int | float) and abs(value) <= _LARGEST for value in values):
        raise ValueError("holds something other than finite numbers")
    return np.array(values, dtype=np.float64)


def _in_pixels(points: Float32[np.ndarray, "joints 3"]) -> Float32[np.ndarray, "joints 3"]:
    found = points[is_found(points), :2]
    if len(found) > 1 and np.abs(found).max() <= 1:
        raise ValueError(
            "the coordinates are fractions of the image; pixels are needed (of OpenPose: run it "
            "with --keypoint_scale 0)"
        )
    return points


def _with_joints(
    people: Float32[np.ndarray, "people 18 3"],
) -> Float32[np.ndarray, "some_people 18 3"]:
    return people[is_found(people).any(axis=1)]


def _list_of(kind: type, values: Any, place: str) -> list[Any]:
    if not isinstance(values, list) or not all(isinstance(value, kind) for value in values):
        raise ValueError(f"key {place!r} is not a list of objects")
    return values


def _why_nothing(name: str, bad_rows: list[BadRow]) -> str:
    missing = f"has no image {name!r}" if name else "lists no image"
    if not bad_rows:
        return f"{missing}; check the name"
    row, reason = bad_rows[0].row, bad_rows[0].reason
    return f"{missing}; {len(bad_rows)} rows are malformed, the first is row {row}: {reason}"
