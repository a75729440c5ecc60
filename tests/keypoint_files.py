"""Writers of the keypoint formats that `cfld.keypoints` reads."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
from jaxtyping import Float

from cfld.keypoints import (
    BODY_25_ORDER,
    COCO_17_ORDER,
    OPENPOSE_KEYS,
    PATN_HEADER,
    ImagePeople,
    midpoint,
)
from cfld.pose import NUM_JOINTS, is_found

_BODY_25_MID_HIP, _RIGHT_HIP, _LEFT_HIP = 8, 8, 11


def write_patn_csv(path: str | Path, rows: Iterable[tuple[str, Float[np.ndarray, "18 3"]]]) -> None:
    """Write rows of name and keypoints in whole pixels, -1 where missing; scores are lost."""
    with fsspec.open(str(path), "wt", encoding="utf-8") as file:
        file.write(PATN_HEADER + "\n")
        for name, keypoints in rows:
            pixels = np.rint(np.maximum(keypoints[:, :2], 0))
            x, y = np.where(is_found(keypoints)[:, None], pixels, -1).astype(int).T.tolist()
            file.write(f"{name}: {y}: {x}\n")


def write_openpose_json(
    path: str | Path, people: Float[np.ndarray, "people 18 3"], *, num_points: int = NUM_JOINTS
) -> None:
    """Write one image's people with 18 (COCO) or 25 (BODY_25) points each, missing as 0, 0, 0.

    BODY_25's middle of the hips is computed, its feet are missing.
    """
    found = np.nan_to_num(people)
    if num_points != NUM_JOINTS:
        points = np.zeros((len(people), num_points, 3), dtype=people.dtype)
        points[:, BODY_25_ORDER] = found
        points[:, _BODY_25_MID_HIP] = np.nan_to_num(midpoint(people, _RIGHT_HIP, _LEFT_HIP))
        found = points
    listed = [{OPENPOSE_KEYS[0]: person.ravel().tolist()} for person in found]
    _write_json(path, {"version": 1.3, "people": listed})


def write_coco_json(
    path: str | Path, images: Iterable[ImagePeople], *, as_results: bool = False
) -> None:
    """Write COCO-17 keypoints, as annotations with v = 0 or 2 or as a list of scored results.

    The neck is lost; readers compute it from the shoulders.
    """
    ours = [COCO_17_ORDER.index(joint) for joint in range(17)]
    files: list[dict[str, Any]] = []
    people: list[dict[str, Any]] = []
    for number, image in enumerate(images, start=1):
        files.append({"id": number, "file_name": image.name})
        for person in image.people[:, ours]:
            entry: dict[str, Any] = {"image_id": number, "category_id": 1}
            points, found = np.nan_to_num(person), np.isfinite(person[:, 0])
            if as_results:
                # Results have no list of images: the name is the id.
                image_id = int(image.name) if image.name.isdigit() else image.name
                entry |= {"image_id": image_id, "score": float(points[:, 2].mean())}
            else:
                points[:, 2] = 2 * found
                entry |= {"id": len(people) + 1, "num_keypoints": int(found.sum())}
            people.append(entry | {"keypoints": points.ravel().tolist()})
    _write_json(path, people if as_results else {"images": files, "annotations": people})


def _write_json(path: str | Path, content: Any) -> None:
    with fsspec.open(str(path), "wt", encoding="utf-8") as file:
        json.dump(content, file)
