"""What a dataset adapter tells the job: photos, rejects, published annotations, expected counts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float32


@dataclass(frozen=True, kw_only=True)
class Photo:
    """One image of one person.

    `path` is a local path or an fsspec URL. `name` is unique in the dataset: the published flat
    name where there is one, else the path below the root with forward slashes. Pairs are formed
    inside one `person` of one `split`, and never with a photo that is not `is_pairable` (junk and
    distractor identities). `keypoints`, if given, are x, y, score in pixels of the image.
    """

    path: str
    name: str
    person: str
    split: str
    view: str | None = None
    is_pairable: bool = True
    keypoints: Float32[np.ndarray, "18 3"] | None = field(default=None, compare=False)


@dataclass(frozen=True, kw_only=True)
class Reject:
    """Something that was left out: where it came from, at which stage, and why.

    `reason` is one snake_case word group that can be counted; `detail` is for people. `path` and
    `detail` are kept printable: bytes of a file name that are no UTF-8 become backslash escapes.
    `name` is the photo's, if it has one.
    """

    path: str
    stage: str
    reason: str
    detail: str = ""
    name: str | None = None

    def __post_init__(self) -> None:
        for name in ("path", "detail"):
            object.__setattr__(self, name, to_text(getattr(self, name)))


@dataclass(frozen=True, kw_only=True)
class Annotations:
    """Published files that replace the pose network and the pairing rule.

    `keypoints` are PATN csv files whose coordinates refer to `frame` (height, width), to the image
    itself where `frame` is None; `pairs` maps a split to a `from,to` csv of photo names.
    """

    keypoints: tuple[str, ...] = ()
    frame: tuple[int, int] | None = None
    pairs: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """A dataset adapter.

    `list_photos(root)` yields photos in a stable order and a reject for everything it skips;
    `expected` holds the published counts that `--check` compares, named as its report names them;
    `access` says where to get it.

    Raises:
        FileNotFoundError: From `list_photos`, before the first photo, when the root is not this
            dataset or a list is missing; the message says what was looked for and what to do.
        ValueError: From `list_photos`, likewise, when a table or list cannot be read, or a column
            is missing.
    """

    list_photos: Callable[[str], Iterator[Photo | Reject]]
    find_annotations: Callable[[str], Annotations] = field(default=lambda _root: Annotations())
    expected: Mapping[str, int] = field(default_factory=dict)
    access: str = ""


def to_text(path: str) -> str:
    """Return a path as text that any file can hold; what is no UTF-8 becomes escapes."""
    return path.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
