"""Any tree with one folder per person, with or without a level of splits above."""

from __future__ import annotations

from collections.abc import Iterator

from preprocessing.files import list_folder, resolve, walk_files, why_no_image
from preprocessing.listing import Dataset, Photo, Reject

SPLITS = frozenset({"train", "val", "valid", "validation", "test"})


def list_photos(root: str) -> Iterator[Photo | Reject]:
    """List `PERSON/IMAGE`, all of split train, or `SPLIT/PERSON/IMAGE`.

    The upper level is one of splits as soon as one of its folders is named train, val, valid,
    validation or test. An image lies directly in its person's folder: one that lies higher has no
    person, and one that lies lower could be of anybody, so both are rejected. So is what does not
    end as an image; only hidden files and the like are passed over.
    """
    root = resolve(root)
    folders, _ = list_folder(root)
    if not folders:
        raise FileNotFoundError(
            f"{root}: there are no folders here. One folder per person is needed, "
            "PERSON/IMAGE.jpg, or one per split with such folders in it, train/PERSON/IMAGE.jpg"
        )
    has_splits = not SPLITS.isdisjoint(folders)
    for file in walk_files(root):
        parts = file.split("/") if has_splits else ["train", *file.split("/")]
        reason = _fault(parts, file)
        if reason:
            yield Reject(path=f"{root}/{file}", stage="listing", reason=reason)
        else:
            yield Photo(path=f"{root}/{file}", name=file, person=parts[1], split=parts[0])


def _fault(parts: list[str], file: str) -> str | None:
    """Return why a file of these parts (split, person, image) is none of the dataset."""
    if reason := why_no_image(file):
        return reason
    if parts[0] not in SPLITS:
        return "not_in_a_split"
    if len(parts) < 3:
        return "not_in_a_person"
    return "nested_folder" if len(parts) > 3 else None


DATASET = Dataset(
    list_photos=list_photos,
    access="Your own photos: one folder per person, or train/ and test/ with such folders in them.",
)
