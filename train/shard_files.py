"""The shards of a run as open files, local ones in place, remote ones through the cache."""

from __future__ import annotations

import logging
import mmap
import os
from collections.abc import Sequence
from pathlib import Path

from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from train.shard_cache import CacheConfig, Shard, ShardCache, ShardError, find_problem

logger = logging.getLogger(__name__)

_MAX_OPEN_FILES = 256


class ShardFiles:
    """The shards of a run as files that are open, verified and read by offset.

    Every shard's sha256 is checked when it arrives, or when it is first opened; processes forked
    from this one share that knowledge.
    """

    def __init__(self, shards: Sequence[Shard], config: CacheConfig) -> None:
        self._shards = tuple(shards)
        self._cache = ShardCache(config)
        self._is_remote = [_is_remote(shard) for shard in shards]
        self._is_verified = mmap.mmap(-1, max(1, len(shards)))  # shared with forked processes
        self._files: dict[int, int] = {}
        self._upcoming: tuple[Shard, ...] = ()

    @property
    def has_remote(self) -> bool:
        """Whether any shard is not a local file."""
        return any(self._is_remote)

    def read(self, number: int, offset: int, size: int) -> bytes:
        """Read bytes of a shard, fetching it first if need be.

        Raises:
            ShardError: If the shard is missing, cut short or not what the manifest says.
        """
        if number not in self._files:
            if len(self._files) >= _MAX_OPEN_FILES:
                os.close(self._files.pop(next(iter(self._files))))
            self._files[number] = self._open(number)
        data = os.pread(self._files[number], size, offset)
        if len(data) != size:
            raise ShardError(
                f"{self._shards[number].url}: ends before byte {offset + size}, which the index "
                "asks for; was it replaced during the run?"
            )
        return data

    def plan(self, upcoming: Sequence[int]) -> None:
        """Fetch these shards, the first needed first, in the background; let go of all others."""
        remote = [number for number in upcoming if self._is_remote[number]]
        for number in [n for n in self._files if self._is_remote[n] and n not in remote]:
            os.close(self._files.pop(number))
        self._upcoming = self._cache.fetch_ahead([self._shards[number] for number in remote])

    def close(self) -> None:
        """Close all files."""
        while self._files:
            os.close(self._files.popitem()[1])

    def _open(self, number: int) -> int:
        shard = self._shards[number]
        if not self._is_remote[number]:
            file = _open_local(shard)
            if not self._is_verified[number]:
                problem = find_problem(Path(shard.url), shard)
                if problem:
                    os.close(file)
                    raise ShardError(
                        f"{shard.url}: {problem}; copy it again from where it was built, or build "
                        "the shards again"
                    )
                self._is_verified[number] = 1
            return file
        for _ in range(2):
            path = self._cache.fetch(shard, self._upcoming)
            try:
                file = os.open(path, os.O_RDONLY)
            except FileNotFoundError:  # evicted by another process in this very moment
                continue
            # A file that an earlier run left may have suffered since.
            problem = None if self._is_verified[number] else find_problem(path, shard)
            if problem is None:
                self._is_verified[number] = 1
                return file
            os.close(file)
            logger.warning("%s: its copy %s %s; fetching it again", shard.url, path, problem)
            path.unlink(missing_ok=True)
        raise ShardError(f"{shard.url}: its copy in {self._cache.folder} does not stay whole")


def _is_remote(shard: Shard) -> bool:
    return not isinstance(url_to_fs(shard.url)[0], LocalFileSystem)


def _open_local(shard: Shard) -> int:
    try:
        return os.open(shard.url, os.O_RDONLY)
    except OSError as error:
        raise ShardError(f"{shard.url}: {error.strerror}; copy the whole shard set") from error
