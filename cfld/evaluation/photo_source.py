"""Photos by name, read where they lie: in a folder of images, or in the tars of a shard set.

Nothing here depends on the code that builds or loads shards: `shards/README.md` promises that an
image can be read with a parquet reader and a byte offset, and evaluation needs no more than that.
"""

from __future__ import annotations

import csv
import hashlib
import json
import posixpath
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from fsspec.spec import AbstractFileSystem
from jaxtyping import Float32, UInt8

from cfld.images import ImageError, decode_image

IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".tif", ".tiff")

_SHARD_FORMAT = ("cfld-shards", 1)
_COLUMNS = ["key", "name", "split", "shard", "image_offset", "image_size", "json_offset",
            "json_size", "height", "width", "keypoints"]  # fmt: skip

Pair = tuple[str, str]


class SourceError(ValueError):
    """A folder does not hold the photos that were asked for, or in an unusable way."""


@dataclass(frozen=True)
class Place:
    """Where a photo's bytes lie; a whole file has offset 0 and no size."""

    path: str
    offset: int = 0
    size: int | None = None


@dataclass(frozen=True)
class PhotoPose:
    """The keypoints of a photo, and its (height, width), in whose pixels they are."""

    keypoints: Float32[np.ndarray, "18 3"]
    frame: tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class PhotoSource:
    """Photos under unique names, the pairs that belong to them if known, and a hash of it all.

    `aliases` leads from every way a result file may call a photo to its name. Only a shard set
    knows poses, the splits it has, and its dataset's name. `note` says what a report must mention
    about these photos.
    """

    where: str
    fs: AbstractFileSystem
    places: Mapping[str, Place]
    aliases: Mapping[str, str]
    pairs: tuple[Pair, ...] | None
    sha256: str
    poses: Mapping[str, PhotoPose] = field(default_factory=dict)
    splits: tuple[str, ...] = ()
    dataset: str | None = None
    note: str | None = None

    def read(self, name: str) -> bytes:
        """Return the encoded bytes of a photo."""
        place = self.places[name]
        return _read_part(self.fs, place.path, place.offset, place.size)

    def decode(self, name: str) -> UInt8[np.ndarray, "height width 3"]:
        """Return a photo as RGB.

        Raises:
            SourceError: If it can't be decoded.
        """
        try:
            return decode_image(self.read(name))
        except ImageError as error:
            raise SourceError(f"{self.where}: photo {name}: {error}") from error


def open_photos(url: str, split: str | None = None, pairs_csv: Path | None = None) -> PhotoSource:
    """Open a shard set (a folder with `manifest.json`; one split or all) or a folder of images.

    A folder's photos are named by their file names without extension, wherever below the folder
    they lie. `pairs_csv`, a published list with columns `from` and `to`, gives or replaces pairs.

    Raises:
        SourceError: If nothing usable is there, or names are not unique.
    """
    fs, root = fsspec.core.url_to_fs(url)
    if not fs.isdir(root):
        raise SourceError(f"{url} is no folder; give a folder of images or a shard set")
    has_manifest = fs.exists(posixpath.join(root, "manifest.json"))
    source = _open_shards(fs, root, url, split) if has_manifest else _open_folder(fs, root, url)
    if pairs_csv is not None:
        source = replace(source, pairs=_read_pairs(pairs_csv, source))
    return source


def stem(name: str) -> str:
    """Return a file's name without its folders and without an image extension, if it has one."""
    base = posixpath.basename(name)
    root, extension = posixpath.splitext(base)
    return root if extension.lower() in IMAGE_EXTENSIONS else base


def _open_folder(fs: AbstractFileSystem, root: str, url: str) -> PhotoSource:
    details = fs.find(root, detail=True)
    files = {path: info for path, info in sorted(details.items())
             if path.lower().endswith(IMAGE_EXTENSIONS)}  # fmt: skip
    if not files:
        raise SourceError(f"{url} holds no image ({', '.join(IMAGE_EXTENSIONS)})")
    counts = Counter(stem(path) for path in files)
    if clashes := sorted(name for name, count in counts.items() if count > 1):
        raise SourceError(
            f"{url}: {len(clashes)} names occur more than once, such as {clashes[:3]}; "
            "keep one file of each name"
        )
    # Sizes and times stand for the contents: reading 50,000 photos to know them would take minutes.
    listing = [
        (posixpath.relpath(path, root), info.get("size"), str(info.get("mtime", "")))
        for path, info in files.items()
    ]
    places = {stem(path): Place(path) for path in files}
    return PhotoSource(
        where=url,
        fs=fs,
        places=places,
        aliases={name: name for name in places},
        pairs=None,
        sha256=_sha256(listing),
    )


def _open_shards(fs: AbstractFileSystem, root: str, url: str, split: str | None) -> PhotoSource:
    manifest_text = fs.cat_file(posixpath.join(root, "manifest.json"))
    manifest = json.loads(manifest_text)
    found = (manifest.get("format"), manifest.get("version"))
    if found != _SHARD_FORMAT:
        raise SourceError(f"{url}: format {found}, this reader needs {_SHARD_FORMAT}")
    index = _read_table(fs, posixpath.join(root, "index.parquet"), _COLUMNS)
    pairs = _read_table(fs, posixpath.join(root, "pairs.parquet"), None)
    poses = _read_poses(index)
    rows = index.drop_columns("keypoints").to_pylist()
    chosen = [row for row in rows if split in (None, row["split"])]
    if not chosen:
        raise SourceError(
            f"{url} has no split {split!r}; it has {sorted({r['split'] for r in rows})}"
        )
    if split is not None:
        pairs = pairs.filter(pc.field("split") == split)
    stems = Counter(stem(row["name"]) for row in chosen)
    aliases = {stem(row["name"]): row["key"] for row in chosen if stems[stem(row["name"])] == 1}
    return PhotoSource(
        where=url,
        fs=fs,
        places={
            row["key"]: Place(
                posixpath.join(root, row["shard"]), row["image_offset"], row["image_size"]
            )
            for row in chosen
        },
        aliases=aliases | {row["key"]: row["key"] for row in chosen},
        pairs=tuple(
            (rows[source]["key"], rows[target]["key"])
            for source, target in zip(
                pairs["source"].to_pylist(), pairs["target"].to_pylist(), strict=True
            )
        ),
        sha256=_sha256([hashlib.sha256(manifest_text).hexdigest(), split]),
        poses={row["key"]: poses[row["key"]] for row in chosen},
        splits=tuple(sorted({row["split"] for row in rows})),
        dataset=manifest.get("dataset"),
        note=_stored_size_note(fs, root, chosen[0]),
    )


def _read_poses(index: pa.Table) -> dict[str, PhotoPose]:
    columns = (index[name].to_pylist() for name in ("key", "height", "width"))
    flat = index["keypoints"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
    return {
        key: PhotoPose(keypoints, (height, width))
        for key, height, width, keypoints in zip(*columns, flat.reshape(-1, 18, 3), strict=True)
    }


def _stored_size_note(fs: AbstractFileSystem, root: str, row: Mapping[str, Any]) -> str | None:
    """Say so if the shards do not hold the original photos, on which the protocol rests."""
    shard = posixpath.join(root, row["shard"])
    record = json.loads(_read_part(fs, shard, row["json_offset"], row["json_size"]))
    stored, photo = (
        (record[f"{prefix}height"], record[f"{prefix}width"]) for prefix in ("", "photo_")
    )
    if stored == photo:
        return None
    return (
        f"Photos are taken as the shards store them, {stored[0]}x{stored[1]}, not as the originals "
        "of the paper's protocol; scores shift a little"
    )


def _read_part(fs: AbstractFileSystem, path: str, offset: int, size: int | None) -> bytes:
    # Not open() and seek(): of a remote file that fetches megabytes more than was asked for.
    end = None if size is None else offset + size
    data: bytes = fs.cat_file(path, start=offset, end=end)
    return data


def _read_table(fs: AbstractFileSystem, path: str, columns: list[str] | None) -> Any:
    if not fs.exists(path):
        raise SourceError(f"{path} is missing beside its manifest; copy the whole folder")
    with fs.open(path, "rb") as file:
        return pq.read_table(file, columns=columns)


def _read_pairs(path: Path, source: PhotoSource) -> tuple[Pair, ...]:
    """Read a published list; a source photo that is not at hand keeps its file name's stem."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    if not rows or not {"from", "to"} <= rows[0].keys():
        raise SourceError(f"{path}: needs rows and the columns 'from' and 'to'")
    missing = [row["to"] for row in rows if stem(row["to"]) not in source.aliases]
    if missing:
        raise SourceError(
            f"{path}: {len(missing)} targets are not in {source.where}, such as {missing[:3]}"
        )
    return tuple(
        (source.aliases.get(stem(row["from"]), stem(row["from"])), source.aliases[stem(row["to"])])
        for row in rows
    )


def _sha256(document: Any) -> str:
    return hashlib.sha256(json.dumps(document).encode()).hexdigest()
