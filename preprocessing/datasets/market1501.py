"""Market-1501: photos of six cameras, 128 high and 64 wide."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial

from preprocessing.datasets import patn
from preprocessing.files import first_present, list_folder, resolve, walk_files, why_no_image
from preprocessing.listing import Dataset, Photo, Reject

# The second name of a split is what other pose-transfer systems rename the folder to.
FOLDERS = {"train": ("bounding_box_train", "train"), "test": ("bounding_box_test", "test"),
           "query": ("query",)}  # fmt: skip
NOT_PAIRABLE = ("-1", "0000")  # junk; distractors, who are many persons

ACCESS = """\
Images (Market-1501-v15.09.15.zip): https://zheng-lab-anu.github.io/Project/project_reid.html
Keypoints and pairs, optional (market-annotation-*.csv, market-pairs-*.csv): linked in the README of
https://github.com/tengteng95/Pose-Transfer and of
https://github.com/PangzeCheung/Dual-task-Pose-Transformer-Network."""

_NAME = re.compile(r"(-1|[0-9]{4})_c([0-9])s[0-9]_[0-9]{6}_[0-9]{2}\.jpg")


def list_photos(root: str) -> Iterator[Photo | Reject]:
    """List the three folders as three splits; `view` is the camera.

    The published test pairs lie in `bounding_box_test`, so `query` stays a split of its own, whose
    names start with `query/` because nothing keeps the two folders' names apart.
    """
    folders = _find_folders(resolve(root))
    for split, folder in folders.items():
        for file in walk_files(folder):
            path = f"{folder}/{file}"
            if match := _NAME.fullmatch(file):
                yield Photo(
                    path=path,
                    name=f"query/{file}" if split == "query" else file,
                    person=match[1],
                    split=split,
                    view=f"c{match[2]}",
                    is_pairable=match[1] not in NOT_PAIRABLE,
                )
            else:
                reason = why_no_image(file) or "malformed_name"
                yield Reject(path=path, stage="listing", reason=reason)


def _find_folders(root: str) -> dict[str, str]:
    below, _ = list_folder(root)
    if "Market-1501-v15.09.15" in below:
        root = f"{root}/Market-1501-v15.09.15"
        below, _ = list_folder(root)
    folders = {split: f"{root}/{name}" for split, name in first_present(FOLDERS, below).items()}
    if not folders.keys() & {"train", "test"}:
        raise FileNotFoundError(
            f"{root}: neither bounding_box_train nor bounding_box_test is here.\n{ACCESS}"
        )
    return folders


DATASET = Dataset(
    list_photos=list_photos,
    find_annotations=partial(patn.find_annotations, prefixes=("market",), frame=(128, 64)),
    expected={
        "images": 36_036,
        "train images": 12_936,
        "train persons": 751,
        "train published pairs": 263_632,
        "test images": 19_732,
        "test persons": 750,
        "test published pairs": 12_000,
        "query images": 3_368,
        "query persons": 750,
    },
    access=ACCESS,
)
