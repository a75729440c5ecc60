"""The csv files published with PATN: keypoints of the images and pairs of their names."""

from __future__ import annotations

from preprocessing.files import first_present, list_folder, resolve
from preprocessing.listing import Annotations

SPLITS = ("train", "test")


def find_annotations(
    root: str, *, prefixes: tuple[str, ...], frame: tuple[int, int]
) -> Annotations:
    """Find `PREFIX-annotation-SPLIT.csv` and `PREFIX-pairs-SPLIT.csv` in the root.

    Where a file is there under several prefixes, the first one counts.
    """
    root = resolve(root)
    _, files = list_folder(root)

    def find(kind: str) -> dict[str, str]:
        names = {split: [f"{prefix}-{kind}-{split}.csv" for prefix in prefixes] for split in SPLITS}
        return {split: f"{root}/{n}" for split, n in first_present(names, files).items()}

    return Annotations(
        keypoints=tuple(find("annotation").values()), frame=frame, pairs=find("pairs")
    )
