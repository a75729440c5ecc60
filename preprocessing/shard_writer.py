"""Writes one tar: plain ustar headers, nothing of the machine in it, hashed on the way."""

from __future__ import annotations

import hashlib
import tarfile
from pathlib import Path
from types import TracebackType

_BLOCK = tarfile.BLOCKSIZE


class TarWriter:
    """An open tar; equal members in equal order give equal bytes, whoever writes it and when.

    Python's own `tarfile` would do, but for a hash it needs the file to be read once more, and
    webdataset's writer adds a block of extended attributes to every member.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb")
        self._digest = hashlib.sha256()
        self.size_bytes = 0

    def __enter__(self) -> TarWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with self._file:
            if error is None:
                self._write(bytes(2 * _BLOCK))

    @property
    def sha256(self) -> str:
        """Hexadecimal hash of what was written; of the whole file once it is closed."""
        return self._digest.hexdigest()

    def add(self, name: str, data: bytes) -> tuple[int, int]:
        """Append a member; return the byte where its content begins, and its length."""
        header = tarfile.TarInfo(name)
        header.size = len(data)
        self._write(header.tobuf(tarfile.USTAR_FORMAT, "ascii", "strict"))
        offset = self.size_bytes
        self._write(data)
        self._write(bytes(-len(data) % _BLOCK))
        return offset, len(data)

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._digest.update(data)
        self.size_bytes += len(data)
