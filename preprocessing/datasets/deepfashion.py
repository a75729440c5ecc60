"""DeepFashion In-shop Clothes Retrieval, raw or flattened, split by the lists of PATN."""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import fsspec

from preprocessing.datasets import patn
from preprocessing.files import first_present, list_folder, resolve, walk_files, why_no_image
from preprocessing.listing import Dataset, Photo, Reject

# Where the folder of MEN and WOMEN lies, depending on where which zip was unpacked.
TREES = ("Img/img_highres", "Img/img_highres/img_highres", "img_highres",
         "img_highres/img_highres", "Img", "")  # fmt: skip
GENDERS = frozenset({"MEN", "WOMEN"})
FLAT = ("train_highres", "test_highres")
FLAT_LOW = ("train", "test")  # of other systems: the same names at 256 pixels height or so

ACCESS = """\
Images: read the agreement at https://mmlab.ie.cuhk.edu.hk/projects/DeepFashion/InShopRetrieval.html
and ask its authors for the password of Img/img_highres.zip; unpack it in the root.
train.lst, test.lst: https://github.com/tengteng95/Pose-Transfer, folder fashion_data.
Keypoints and pairs, optional (fasion-resize-*.csv): linked in the README of that repository and of
https://github.com/PangzeCheung/Dual-task-Pose-Transformer-Network."""

_NAME = re.compile(r"fashion(WOMEN|MEN)([A-Za-z_]+)id([0-9]{8})([0-9]{2})_([0-9])([a-z]+)\.jpg")
_PATH = re.compile(r"(WOMEN|MEN)/([A-Za-z_]+)/id_([0-9]{8})/([0-9]{2})_([0-9])_([a-z]+)\.jpg")


def flat_name(path: str) -> str | None:
    """Return the published name of an image of the raw tree, None if the path is not one of it."""
    match = _PATH.fullmatch(path)
    return "fashion{}{}id{}{}_{}{}.jpg".format(*match.groups()) if match else None


def raw_path(name: str) -> str | None:
    """Return where the raw tree holds a published name, None if it is not such a name."""
    match = _NAME.fullmatch(name)
    return "{}/{}/id_{}/{}_{}_{}.jpg".format(*match.groups()) if match else None


@dataclass(frozen=True)
class Source:
    """A folder of images: the raw tree, or one whose files carry the published names."""

    folder: str
    is_flat: bool
    is_root: bool = False

    def path(self, name: str) -> str:
        """Return where this source holds a published name."""
        return f"{self.folder}/{name if self.is_flat else raw_path(name)}"

    def files(self) -> Iterator[str]:
        """Yield the paths of all files below the folder; in a root, of MEN and WOMEN alone."""
        if not self.is_root:
            yield from walk_files(self.folder)
            return
        for gender in sorted(GENDERS.intersection(list_folder(self.folder)[0])):
            yield from (f"{gender}/{file}" for file in walk_files(f"{self.folder}/{gender}"))


def list_photos(root: str) -> Iterator[Photo | Reject]:
    """List what is in `train.lst` and `test.lst`, sorted by name within a split.

    An image that is there several times (flattened copies beside the raw tree) counts once, and the
    flattened copy is read. Files that no list names are rejected as `not_listed`, folders of copies
    in low resolution beside others as `not_used`; what else lies in the root is passed over.
    """
    root = resolve(root)
    (sources, unused), lists = _find_sources(root), _find_lists(root)
    if not sources or len(lists) < len(patn.SPLITS):
        raise FileNotFoundError(_missing(root, sources, lists))
    split_of: dict[str, str] = {}
    for split, path in lists.items():
        yield from _read_list(path, split, split_of)
    holder: dict[str, Source] = {}
    for source in sources:
        for file in source.files():
            name, path = file if source.is_flat else flat_name(file), f"{source.folder}/{file}"
            if name in split_of:
                holder.setdefault(name, source)
            elif not any(path.startswith(f"{inner}/") for inner in _inside(source, sources)):
                reason = why_no_image(file) or "not_listed"
                yield Reject(path=path, stage="listing", reason=reason)
    for folder in unused:
        yield Reject(
            path=folder,
            stage="listing",
            reason="not_used",
            detail="copies in low resolution, beside the images themselves",
        )
    for split in patn.SPLITS:
        for name in sorted(name for name, of in split_of.items() if of == split):
            if name in holder:
                yield _photo(name, split, holder[name])
            else:
                path, detail = sources[-1].path(name), f"in {lists[split]}"
                yield Reject(path=path, stage="listing", reason="missing_image", detail=detail)


def _photo(name: str, split: str, source: Source) -> Photo:
    person, _, view = name.removesuffix(".jpg").rpartition("_")
    return Photo(
        path=source.path(name),
        name=name,
        person=person,
        split=split,
        view=view.lstrip("0123456789"),
    )


def _read_list(path: str, split: str, split_of: dict[str, str]) -> Iterator[Reject]:
    """Fill `split_of` from a list, a name a line; yield the lines that cannot be used."""
    for number, line in enumerate(_read_lines(path), 1):
        name = line.strip()
        if name and (name in split_of or raw_path(name) is None):
            reason = "listed_twice" if name in split_of else "malformed_name"
            yield Reject(path=name, stage="listing", reason=reason, detail=f"{path}, line {number}")
        elif name:
            split_of[name] = split


def _read_lines(path: str) -> list[str]:
    try:
        with fsspec.open(path, "rt", encoding="utf-8", errors="replace", compression="infer") as f:
            return list(f)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: cannot be read ({error}); get it again.\n{ACCESS}") from error


def _find_lists(root: str) -> dict[str, str]:
    _, files = list_folder(root)
    names = {split: [f"{split}.lst", f"{split}.lst.gz"] for split in patn.SPLITS}
    return {split: f"{root}/{name}" for split, name in first_present(names, files).items()}


def _find_sources(root: str) -> tuple[list[Source], list[str]]:
    """Find the folders of images, the preferred one first, and those that are left unused."""
    folders = list_folder(root)[0]
    sources = [Source(f"{root}/{name}", is_flat=True) for name in FLAT if name in folders]
    for tree in TREES:
        folder = f"{root}/{tree}".rstrip("/")
        if not GENDERS.isdisjoint(_folders(folder)):
            sources.append(Source(folder, is_flat=False, is_root=not tree))
    low = [f"{root}/{name}" for name in FLAT_LOW if name in folders]
    return (sources, low) if sources else ([Source(folder, is_flat=True) for folder in low], [])


def _inside(source: Source, sources: list[Source]) -> list[str]:
    """Return the folders of the sources that lie inside a source's."""
    return [s.folder for s in sources if s.folder.startswith(f"{source.folder}/")]


def _folders(folder: str) -> list[str]:
    try:
        return list_folder(folder)[0]
    except FileNotFoundError:
        return []


def _missing(root: str, sources: list[Source], lists: dict[str, str]) -> str:
    """Say what of the dataset is there and what is not."""
    found = [f"{sum(1 for _ in s.files()):,} files in {s.folder}" for s in sources]
    found += lists.values()
    lacking = [f"{split}.lst (or .lst.gz)" for split in patn.SPLITS if split not in lists]
    if not sources:
        places = " or ".join(tree or "the root" for tree in TREES)
        lacking.append(f"images (MEN and WOMEN in {places}; or the folders {' and '.join(FLAT)})")
    return (
        f"{root}: found {', '.join(found) or 'nothing'}; missing: {'; '.join(lacking)}.\n{ACCESS}"
    )


DATASET = Dataset(
    list_photos=list_photos,
    find_annotations=partial(
        patn.find_annotations, prefixes=("fasion-resize", "fashion-resize"), frame=(256, 176)
    ),
    expected={
        "images": 52_712,
        "train images": 48_674,
        "train persons": 12_029,
        "train persons with a single image": 105,
        "train pairs before the keypoint filter": 154_758,
        "train published pairs": 101_966,
        "test images": 4_038,
        "test persons": 1_000,
        "test persons with a single image": 12,
        "test pairs before the keypoint filter": 12_860,
        "test published pairs": 8_570,
    },
    access=ACCESS,
)
