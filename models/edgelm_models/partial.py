"""A file that grows, is checked while it is written, and is kept aside when it is not what was promised.

Knows bytes and digests; not where they come from.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, BinaryIO, Self

from edgelm.errors import DownloadError
from edgelm.sizes import MB, MIB, human

if TYPE_CHECKING:
    import hashlib

CHUNK_BYTES = MIB
SPARE_BYTES = 32 * MB


def _sha256() -> hashlib._Hash:
    import hashlib  # loads OpenSSL, 3.6 MB that who runs a model which is here already does not need

    return hashlib.sha256()


def digest_of(path: Path) -> str:
    """Return the sha256 of a file in hexadecimal, reading 1 MiB at a time."""
    digest = _sha256()
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def require_space(folder: Path, needed_bytes: int) -> None:
    """Raise `DownloadError` unless `folder`'s file system has `needed_bytes` and a little more to spare."""
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes < needed_bytes + SPARE_BYTES:
        raise DownloadError(
            f"{folder} has {human(free_bytes)} free and the pull needs {human(needed_bytes + SPARE_BYTES)}; "
            "free some space, or set EDGELM_CACHE to a folder on a larger disk"
        )


def set_aside(path: Path, found: str, promised: str, name: str) -> DownloadError:
    """Move a wrong file out of the way and return the error to raise."""
    aside = path.with_name(path.name.removesuffix(".partial") + ".mismatch")
    os.replace(path, aside)
    return DownloadError(
        f"{name}: what arrived has sha256 {found} instead of {promised}; "
        f"it was not registered and is kept aside as {aside}; pull again"
    )


class PartialFile:
    """Appends to `path` and hashes what it appends; keeps what an earlier attempt left, up to `keep_bytes`.

    Peak memory is one chunk of 1 MiB, also while the earlier attempt's bytes are hashed again.
    """

    def __init__(self, path: Path, keep_bytes: int) -> None:
        self.path = path
        self._digest = _sha256()
        self._file: BinaryIO = open(path, "a+b")  # noqa: SIM115 - closed by __exit__
        self._file.truncate(keep_bytes)
        self._file.seek(0)
        while chunk := self._file.read(CHUNK_BYTES):
            self._digest.update(chunk)
        self.size_bytes = self._file.tell()

    def restart(self) -> None:
        """Forget everything written so far."""
        self._file.truncate(0)
        self._digest = _sha256()
        self.size_bytes = 0

    def append(self, chunk: bytes) -> None:
        self._file.write(chunk)
        self._digest.update(chunk)
        self.size_bytes += len(chunk)

    def check(self, sha256: str, name: str) -> None:
        """Flush to the disk; set the file aside and raise `DownloadError` if the digest is not `sha256`."""
        self._file.flush()
        os.fsync(self._file.fileno())
        found = self._digest.hexdigest()
        if found != sha256:
            self._file.close()
            raise set_aside(self.path, found, sha256, name)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
