"""Drawn persons in the sizes and byte counts of DeepFashion's photos, under any names."""

import os
from collections.abc import Iterable, Iterator, Sequence
from multiprocessing import Pool
from pathlib import Path

import cv2
import numpy as np

from cfld.images import encode_jpeg
from preprocessing.figures import draw_figure, pose_figure
from preprocessing.shard_stage import SHOULDERS_AND_HIPS

DRAWN_PX = 275  # drawn at a quarter of the size, then enlarged


def draw_photo(task: tuple[int, tuple[int, int], float]) -> bytes:
    """A figure with some sensor noise, JPEG of quality 95."""
    number, size, noise = task
    scale = min(1.0, DRAWN_PX / size[0])
    drawn_size = (max(32, round(size[0] * scale)), max(32, round(size[1] * scale)))
    figure = draw_figure(number // 6, number % 6, size=drawn_size, seed=0).image
    photo = cv2.resize(figure, size[::-1], interpolation=cv2.INTER_CUBIC).astype(np.float32)
    rng = np.random.default_rng(number)
    grain = rng.normal(0, 2 * noise, (size[0] // 2, size[1] // 2)).astype(np.float32)
    photo += cv2.resize(grain, size[::-1])[..., None]
    return encode_jpeg(photo.clip(0, 255).astype(np.uint8), 95)


def draw_photos(number: int, size: tuple[int, int], noise: float) -> list[bytes]:
    """Draw distinct photos on all cores."""
    with Pool(os.cpu_count()) as pool:
        return pool.map(draw_photo, [(i, size, noise) for i in range(number)], chunksize=4)


def write_photos(folder: Path, names: Sequence[str], photos: Sequence[bytes]) -> None:
    """Write a file for each name; names share the drawn photos in turn, by hard links."""
    folder.mkdir(parents=True, exist_ok=True)
    originals = folder.parent / f"{folder.name}.originals"
    originals.mkdir(exist_ok=True)
    for number, photo in enumerate(photos):
        (originals / f"{number}.jpg").write_bytes(photo)
    for number, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.hardlink_to(originals / f"{number % len(photos)}.jpg")


def keypoint_rows(names: Iterable[str], frame: tuple[int, int]) -> Iterator[str]:
    """Rows of a PATN csv: poses of drawn persons who stand whole in the frame."""
    yield "name:keypoints_y:keypoints_x\n"
    poses = [p for p in (whole_pose(number, frame) for number in range(600)) if p is not None]
    for number, name in enumerate(names):
        x, y = poses[number % len(poses)]
        yield f"{name}: {y}: {x}\n"


def whole_pose(number: int, frame: tuple[int, int]) -> tuple[list[int], list[int]] | None:
    """x and y of a pose, -1 where a joint is missing; None unless shoulders and hips are there."""
    keypoints, _ = pose_figure(number // 6, number % 6, size=frame, seed=0)
    is_there = np.isfinite(keypoints[:, 0])
    if not is_there[list(SHOULDERS_AND_HIPS)].all():
        return None
    x, y = np.where(is_there, keypoints[:, :2].T, -1).astype(int).tolist()
    return x, y
