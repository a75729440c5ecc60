"""Reads photo files, some ahead of need, and tells a bad file from a store that fails."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from fsspec.core import url_to_fs

from cfld.images import ImageError

_NUM_READ_AHEAD = 16  # hides a remote store's latency behind the decoding of others


class PhotoStoreError(RuntimeError):
    """A remote store failed to give a photo that may well be good: worth another try."""


def read_photo(path: str) -> bytes:
    """Return the bytes of the file at a local path or fsspec URL.

    Raises:
        ImageError: With reason `missing_file` or `unreadable`, which will not change by retrying.
        PhotoStoreError: If a remote store fails.
    """
    local = Path(path.removeprefix("file://")) if is_local(path) else None
    try:
        if local is None:
            fs, remote = url_to_fs(path)
            data: bytes = fs.cat_file(remote)
            return data
        if local.exists() and not local.is_file():  # opening a pipe would wait for ever
            raise ImageError("unreadable", f"{path}: a directory, pipe or device, no file")
        return local.read_bytes()
    except FileNotFoundError as error:
        raise ImageError("missing_file", str(error)) from None
    except (PermissionError, IsADirectoryError, NotADirectoryError) as error:
        raise ImageError("unreadable", str(error)) from None
    except ImageError:
        raise
    except Exception as error:  # each kind of store has its own
        if local is not None:
            raise ImageError("unreadable", str(error)) from None
        raise PhotoStoreError(f"{path}: {type(error).__name__}: {error}") from error


def read_size(path: str) -> int | None:
    """Return the size in bytes of the file at a local path or URL, None if it is no file.

    Raises:
        PhotoStoreError: If a remote store fails.
    """
    try:
        fs, place = url_to_fs(path)
        return int(fs.size(place)) if fs.isfile(place) else None
    except Exception as error:  # each kind of store has its own
        if is_local(path):
            return None
        raise PhotoStoreError(f"{path}: {type(error).__name__}: {error}") from error


def is_local(path: str) -> bool:
    """Whether a path or URL is a file of this machine."""
    return "://" not in path.removeprefix("file://")


def read_ahead(paths: Sequence[str]) -> Iterator[Future[bytes]]:
    """Yield a future of `read_photo` for each path, in order, reading the next ones meanwhile."""
    with ThreadPoolExecutor(_NUM_READ_AHEAD) as pool:
        pending: deque[Future[bytes]] = deque()
        for path in paths:
            pending.append(pool.submit(read_photo, path))
            if len(pending) > _NUM_READ_AHEAD:
                yield pending.popleft()
        yield from pending
