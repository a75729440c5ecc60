"""Lists folders of local disks and remote stores alike: sorted, without clutter, a call each."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import PurePosixPath

from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

# The last three are photos that cannot be read, which is told of each: what to do about it.
IMAGE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".heic", ".heif", ".avif"}
)

# What file managers and archivers leave behind; like hidden names it is nobody's data.
_CLUTTER = frozenset({"Thumbs.db", "desktop.ini", "__MACOSX"})


def is_image(name: str) -> bool:
    """Whether a file name ends as an image's does, in either case."""
    return PurePosixPath(name).suffix.lower() in IMAGE_SUFFIXES


def why_no_image(file: str) -> str | None:
    """Return the reason why what `walk_files` yields is no image by its name, None if it is one."""
    if file.endswith("/"):
        return "unreadable"
    return None if is_image(file) else "not_an_image"


def first_present(wanted: Mapping[str, Sequence[str]], present: Collection[str]) -> dict[str, str]:
    """Return for each key the first of its names that is present; keys without one are left out."""
    found = {key: [name for name in names if name in present] for key, names in wanted.items()}
    return {key: names[0] for key, names in found.items() if names}


def resolve(root: str) -> str:
    """Return a local path as absolute, a URL in its full form, both without a final slash."""
    fs, path = url_to_fs(root)
    if isinstance(fs, LocalFileSystem):
        return os.path.abspath(path)  # noqa: PTH100 - Path.resolve would follow links
    return fs.unstrip_protocol(path).rstrip("/")


def list_folder(folder: str) -> tuple[list[str], list[str]]:
    """Return the names of a folder's sub-folders and of its files, each sorted, without clutter.

    Links are followed.

    Raises:
        FileNotFoundError: If there is no such folder.
    """
    fs, path = url_to_fs(folder)
    try:
        if isinstance(fs, LocalFileSystem):
            with os.scandir(path) as entries:  # fsspec's own listing does not follow links
                names = [(entry.name, _is_folder(entry)) for entry in entries]
        else:
            below = [info for info in fs.ls(path, detail=True) if info["name"].rstrip("/") != path]
            names = [(PurePosixPath(i["name"]).name, i["type"] == "directory") for i in below]
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(f"{folder}: there is no such folder") from None
    # A set, as s3fs may give a folder twice when it also has a marker.
    names = sorted({name for name in names if not _is_clutter(name[0])})
    return [n for n, is_folder in names if is_folder], [
        n for n, is_folder in names if not is_folder
    ]


def walk_files(folder: str) -> Iterator[str]:
    """Yield the paths, relative to `folder`, of all files below it, without clutter.

    The order is that of the paths' parts, the same on every file system. A sub-folder that may not
    be read comes with a slash at its end, so that it ends as a reject.

    Raises:
        FileNotFoundError: If there is no such folder.
    """
    fs, path = url_to_fs(folder)
    if isinstance(fs, LocalFileSystem):
        yield from _walk(folder, "", frozenset())
        return
    # One call per thousand files, where a call per folder would be one per person.
    keys = fs.find(path)
    if not keys:
        raise FileNotFoundError(f"{folder}: there is no such folder")
    # A key that ends with a slash is how consoles of object stores make an empty folder.
    files = (key.removeprefix(path).lstrip("/") for key in keys if not key.endswith("/"))
    parts = sorted(file.split("/") for file in files if file)
    yield from ("/".join(p) for p in parts if not any(map(_is_clutter, p)))


def _walk(folder: str, below: str, above: frozenset[tuple[int, int]]) -> Iterator[str]:
    folders, files = list_folder(folder)
    status = os.stat(folder)  # noqa: PTH116 - strings all the way: this runs for every folder
    identity = (status.st_dev, status.st_ino)
    if identity in above:  # a link back to a folder that this one lies in
        return
    kinds = dict.fromkeys(folders, True) | dict.fromkeys(files, False)
    for name, is_folder in sorted(kinds.items()):
        if is_folder:
            try:
                yield from _walk(f"{folder}/{name}", f"{below}{name}/", above | {identity})
            except PermissionError:
                yield f"{below}{name}/"
        else:
            yield f"{below}{name}"


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself
        return False


def _is_clutter(name: str) -> bool:
    return name.startswith(".") or name in _CLUTTER
