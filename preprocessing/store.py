"""The output folder, local or in an object store: a file appears there whole or not at all."""

from __future__ import annotations

import os
import posixpath
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from fsspec.spec import AbstractFileSystem

WORK_FOLDER = "_work"


class OutputError(RuntimeError):
    """The output cannot be written: a full disk, no permission, a store that refuses."""


@dataclass(frozen=True)
class Store:
    """A folder on some file system; names are relative to it. It can be sent to other processes."""

    fs: AbstractFileSystem
    root: str

    @classmethod
    def open(cls, url: str) -> Store:
        """Return the store at a local path or an fsspec URL; nothing is created yet."""
        fs, root = url_to_fs(url)
        return cls(fs, root.rstrip("/"))

    @property
    def is_local(self) -> bool:
        """Whether files are renamed into place; else they are uploaded as one object."""
        return isinstance(self.fs, LocalFileSystem)

    def path(self, name: str) -> str:
        """Return the full path of a name."""
        return posixpath.join(self.root, name)

    def url(self, name: str) -> str:
        """Return what people call the file of a name."""
        return self.path(name) if self.is_local else str(self.fs.unstrip_protocol(self.path(name)))

    def exists(self, name: str) -> bool:
        """Whether there is such a file."""
        return bool(self.fs.exists(self.path(name)))

    def names(self, folder: str = "") -> list[str]:
        """Return the sorted names of what lies directly in a folder; none if it does not exist."""
        self.fs.invalidate_cache()
        try:
            paths = self.fs.ls(self.path(folder), detail=False)
        except (FileNotFoundError, NotADirectoryError):
            return []
        return sorted(posixpath.basename(path.rstrip("/")) for path in paths)

    def sizes(self) -> dict[str, int]:
        """Return the size in bytes of each file that lies directly in the store."""
        self.fs.invalidate_cache()
        found = self.fs.ls(self.root, detail=True)
        return {posixpath.basename(i["name"]): i["size"] for i in found if i["type"] == "file"}

    def read_bytes(self, name: str) -> bytes:
        """Read a whole file."""
        data: bytes = self.fs.cat_file(self.path(name))
        return data

    def read_table(self, name: str) -> pa.Table:
        """Read a parquet file."""
        with self.fs.open(self.path(name), "rb") as file:
            return pq.read_table(file)

    def write_bytes(self, name: str, data: bytes) -> None:
        """Write a file, replacing one of that name."""
        with self.new_file(name) as path:
            path.write_bytes(data)

    def write_table(self, name: str, table: pa.Table) -> None:
        """Write a parquet file, replacing one of that name."""
        with self.new_file(name) as path:
            pq.write_table(table, path, compression="zstd")

    @contextmanager
    def new_file(self, name: str) -> Iterator[Path]:
        """Give a local path to write to; it takes its final name when the block ends well.

        Several processes may write the same name at once: each has its own temporary file.

        Raises:
            OutputError: If the disk is full, or the place cannot be written to.
        """
        temporary = self._make_temporary_folder() / f"{uuid.uuid4().hex}.tmp"
        try:
            yield temporary
            self._publish(temporary, name)
        except OSError as error:
            raise OutputError(
                f"{self.url(name)} could not be written: {error.strerror or error}. Make room or "
                "give permission, then run the same command again: what is finished is kept"
            ) from error
        finally:
            temporary.unlink(missing_ok=True)

    def move(self, name: str, new_name: str) -> None:
        """Give a file another name, replacing one of that name.

        Raises:
            OutputError: If the place cannot be written to.
        """
        try:
            if self.is_local:
                Path(self.path(name)).replace(self.path(new_name))
            else:
                self.fs.mv(self.path(name), self.path(new_name))
        except OSError as error:
            raise OutputError(
                f"{self.url(name)} could not become {self.url(new_name)}: "
                f"{error.strerror or error}. Give permission, then run the same command again"
            ) from error

    def remove(self, name: str) -> None:
        """Remove a file, if there is one."""
        if self.exists(name):
            self.fs.rm_file(self.path(name))

    def remove_temporary(self) -> None:
        """Remove what killed processes of this machine left; not while others still write here."""
        for path in self._temporary_folder.glob("*.tmp"):
            path.unlink(missing_ok=True)
        if not self.is_local:
            shutil.rmtree(self._temporary_folder, ignore_errors=True)

    def remove_work(self) -> None:
        """Remove the work folder with all that it holds."""
        if self.is_local:
            shutil.rmtree(self.path(WORK_FOLDER), ignore_errors=True)
        elif self.exists(WORK_FOLDER):
            self.fs.rm(self.path(WORK_FOLDER), recursive=True)

    @property
    def _temporary_folder(self) -> Path:
        if self.is_local:
            return Path(self.path(WORK_FOLDER))  # the same disk, so that renaming is atomic
        name = sha256(self.url("").encode()).hexdigest()[:16]
        return Path(tempfile.gettempdir()) / f"cfld-{name}"

    def _make_temporary_folder(self) -> Path:
        folder = self._temporary_folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(
                f"{folder}: cannot make this folder: {error.strerror or error}"
            ) from error
        return folder

    def _publish(self, temporary: Path, name: str) -> None:
        if not self.is_local:
            self.fs.put_file(str(temporary), self.path(name))
            return
        with temporary.open("rb") as file:
            os.fsync(file.fileno())  # else a power cut could leave the name without the content
        target = Path(self.path(name))
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary.replace(target)
