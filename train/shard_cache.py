"""Remote shards fetched whole, and verified, into a folder of bounded size."""

from __future__ import annotations

import fcntl
import logging
import os
import threading
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from shards.format import sha256_of

logger = logging.getLogger(__name__)


class ShardError(RuntimeError):
    """A shard cannot be had whole; training must stop, it cannot go around it."""


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One tar, by its local path or URL, as the manifest describes it."""

    url: str
    size_bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """Where remote shards are kept, and how hard to try to get them."""

    folder: str = "~/.cache/cfld/shards"
    """Runs, ranks and workers of one machine may share it."""
    size_bytes: int = 16 * 2**30
    """Never exceeded, shards on their way included."""
    num_retries: int = 5
    backoff_s: float = 0.5
    """Pause before the first retry; it doubles with every further one."""
    lookahead_steps: int = 64
    """Optimizer steps ahead of which shards are fetched."""


class ShardCache:
    """Whole shards in a folder of bounded size, named by their sha256, evicted when long unused.

    A shard is fetched under a temporary name, on which the fetching process holds a kernel lock,
    and renamed when its hash is right: a kill leaves neither locks nor half shards behind.
    """

    def __init__(self, config: CacheConfig) -> None:
        self.folder = Path(config.folder).expanduser()
        self._config = config
        self._ahead: tuple[Shard, ...] = ()
        self._failed: set[Shard] = set()
        self._wake = threading.Event()
        self._thread_owner = 0

    def fetch(self, shard: Shard, upcoming: Collection[Shard] = ()) -> Path:
        """Return the path of a shard's verified copy, fetching it if there is none.

        Raises:
            ShardError: If it cannot be fetched whole, or the cache has no room for it.
        """
        path = self._fetch(shard, upcoming, wait=True)
        assert path is not None
        return path

    def fetch_ahead(self, upcoming: Sequence[Shard]) -> tuple[Shard, ...]:
        """Start to fetch, in this order, as many of these shards as the cache can hold together.

        Returns them. They are not evicted before others. A new call replaces an older one's rest.
        """
        room, shards = self._config.size_bytes, []
        for shard in upcoming:
            room -= shard.size_bytes
            if room < 0:
                break
            shards.append(shard)
            self._touch(shard)
        self._ahead = tuple(shards)
        if shards and self._thread_owner != os.getpid():  # threads do not survive a fork
            self._thread_owner, self._wake = os.getpid(), threading.Event()
            threading.Thread(target=self._run, name="fetch-shards", daemon=True).start()
        self._wake.set()
        return self._ahead

    def _run(self) -> None:
        while True:
            self._wake.wait()
            self._wake.clear()
            for shard in self._ahead:
                if self._wake.is_set():
                    break
                if shard in self._failed:
                    continue
                try:
                    self._fetch(shard, self._ahead, wait=False)
                except (ShardError, OSError) as error:
                    # Whoever needs it tries once more; there the run stops if it must.
                    self._failed.add(shard)
                    logger.warning("fetching ahead: %s", error)

    def _fetch(self, shard: Shard, upcoming: Collection[Shard], *, wait: bool) -> Path | None:
        """Return the copy's path; without `wait` None if another process is at it, or no room."""
        path, part = self._path(shard), self._part(shard)
        self.folder.mkdir(parents=True, exist_ok=True)
        while not self._touch(shard):
            with part.open("ab") as claim:
                if not _lock(claim, wait=wait):
                    return None
                try:
                    # Its former owner may have renamed it to the whole shard, or removed it.
                    if _is_same(claim, part) and not path.exists():
                        if not self._make_room(upcoming, is_needed=wait):
                            return None
                        self._download(shard, part)
                        with self._locked_folder():
                            part.replace(path)
                finally:
                    if _is_same(claim, part):
                        part.unlink()
        return path

    def _download(self, shard: Shard, part: Path) -> None:
        """Fetch a shard into `part`; failures are retried, a wrong hash only once."""
        num_wrong, reason = 0, ""
        for attempt in range(1 + self._config.num_retries):
            if attempt:
                time.sleep(self._config.backoff_s * 2 ** (attempt - 1))
            try:
                fs, path = url_to_fs(shard.url)
                fs.get_file(path, str(part))
            except FileNotFoundError:
                raise ShardError(f"{shard.url} is missing; copy the whole shard set") from None
            except Exception as error:  # every backend of fsspec raises its own
                reason = f"{type(error).__name__}: {error}"
            else:
                reason = find_problem(part, shard) or ""
                if not reason:
                    return
                num_wrong += part.stat().st_size == shard.size_bytes
            logger.warning("%s: %s (attempt %d)", shard.url, reason, attempt + 1)
            if num_wrong == 2:
                break
        raise ShardError(f"{shard.url}: {reason}, after {attempt + 1} attempts; the run stops")

    def _make_room(self, upcoming: Collection[Shard], *, is_needed: bool) -> bool:
        """Evict the longest unused shards until all there are, parts in full size, fit.

        Shards of `upcoming` go last, and only for one that `is_needed` at once.
        """
        kept = {self._path(shard) for shard in upcoming}
        with self._locked_folder():
            files = sorted(_files_in(self.folder), key=lambda f: (f.path in kept, f.used_ns))
            excess = sum(file.size_bytes for file in files) - self._config.size_bytes
            for file in files:
                if excess <= 0:
                    break
                if file.path in kept and not is_needed:
                    return False
                if _evict(file):
                    excess -= file.size_bytes
        if excess > 0 and is_needed:
            raise ShardError(
                f"{self.folder}: {self._config.size_bytes} bytes do not hold the shards that are "
                "being fetched at once; raise cache.size_bytes"
            )
        return excess <= 0

    @contextmanager
    def _locked_folder(self) -> Iterator[None]:
        """Keep other processes from counting or renaming files meanwhile."""
        folder = os.open(self.folder, os.O_RDONLY)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)
            yield
        finally:
            os.close(folder)

    def _touch(self, shard: Shard) -> bool:
        """Mark a copy as used now; false if there is none."""
        try:
            os.utime(self._path(shard))
        except FileNotFoundError:
            return False
        return True

    def _path(self, shard: Shard) -> Path:
        return self.folder / f"{shard.sha256}.tar"

    def _part(self, shard: Shard) -> Path:
        # The name carries the size, so that room is reserved before the bytes arrive.
        return self.folder / f"{shard.sha256}.{shard.size_bytes}.part"


def find_problem(path: Path, shard: Shard) -> str | None:
    """Say what is wrong with a shard's file, if anything."""
    size_bytes = path.stat().st_size
    if size_bytes != shard.size_bytes:
        return f"has {size_bytes} bytes where the manifest says {shard.size_bytes}"
    sha256 = sha256_of(LocalFileSystem(), str(path))
    if sha256 != shard.sha256:
        return f"has sha256 {sha256} where the manifest says {shard.sha256}"
    return None


@dataclass(frozen=True)
class _CachedFile:
    path: Path
    size_bytes: int
    used_ns: int

    @property
    def is_part(self) -> bool:
        return self.path.suffix == ".part"


def _files_in(folder: Path) -> Iterator[_CachedFile]:
    for path in folder.iterdir():
        try:
            status = path.stat()
        except FileNotFoundError:
            continue
        if path.suffix == ".part":
            yield _CachedFile(path, int(path.suffixes[-2][1:]), status.st_mtime_ns)
        elif path.suffix == ".tar":
            yield _CachedFile(path, status.st_size, status.st_mtime_ns)


def _lock(file: BinaryIO, *, wait: bool) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    return True


def _is_same(file: BinaryIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _evict(file: _CachedFile) -> bool:
    """Remove a whole shard, or a part that no process is fetching any more."""
    try:
        with file.path.open("rb") as claim:
            if file.is_part and not _lock(claim, wait=False):
                return False
            file.path.unlink()
    except FileNotFoundError:
        pass
    return True
