"""A file for what does not fit in memory: nameless, past the page cache, gone with the process.

Knows bytes and a folder; nothing of what they mean.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from edgelm.errors import EdgeLMError
from edgelm.memory.buffer import PAGE
from edgelm.memory.platform import Platform, current_platform
from edgelm.memory.stores import check_request
from edgelm.sizes import MB, human

SPARE_BYTES = 64 * MB
"""Free space of the drive that is left to others."""


class ScratchError(EdgeLMError):
    """Flash could not take or give back what does not fit in memory."""


class ScratchFile:
    """`n_bytes` of flash that one model writes and reads in whole blocks of 4096. A store of a single file, 0."""

    def __init__(self, folder: Path, n_bytes: int, platform: Platform | None = None) -> None:
        """Raises `ScratchError` if the drive has too little room, or refuses direct reads and writes."""
        self._platform, self._folder = platform or current_platform(), folder
        self.n_bytes, self.how = n_bytes, f"direct ({self._platform.direct_how})"
        self._handle = -1
        try:
            folder.mkdir(parents=True, exist_ok=True)
            free_bytes = shutil.disk_usage(folder).free
            if free_bytes < n_bytes + SPARE_BYTES:
                raise ScratchError(
                    f"{folder} has {human(free_bytes)} free; keys and values may take {human(n_bytes)} there, and "
                    f"{human(SPARE_BYTES)} must stay free; set EDGELM_CACHE to a roomier drive, or raise --memory"
                )
            # not tempfile: importing it costs a megabyte; the name is this process's own
            path = folder / f"spilled-{os.getpid()}-{time.monotonic_ns()}.tmp"
            self._handle = self._platform.open_scratch(str(path), n_bytes)
        except OSError as exc:
            raise ScratchError(
                f"{folder} cannot hold keys and values ({exc.strerror or exc}); "
                "set EDGELM_CACHE to another drive, or raise --memory"
            ) from exc

    def read_into(self, file: int, offset: int, n_bytes: int, buffer: memoryview, at: int) -> int:
        """See `Store.read_into`; offset and size are multiples of 4096."""
        check_request(offset, n_bytes, buffer, at)
        self._move(self._platform.read, offset, buffer[at : at + n_bytes], "reading")
        return at

    def write(self, offset: int, view: memoryview) -> None:
        """Put page-aligned memory at `offset`; both are whole blocks of 4096."""
        self._move(self._platform.write, offset, view, "writing")

    def _move(self, call: Callable[[int, memoryview, int], int], offset: int, view: memoryview, action: str) -> None:
        assert offset % PAGE == 0, offset
        assert len(view) % PAGE == 0, len(view)
        done = 0
        try:
            while done < len(view):
                moved = call(self._handle, view[done:], offset + done)
                if moved <= 0 or moved % PAGE:
                    raise OSError(f"only {moved} of {len(view) - done} bytes went through")
                done += moved
        except OSError as exc:
            raise ScratchError(
                f"{action} keys and values in {self._folder} failed ({exc.strerror or exc}); check the drive"
            ) from exc

    def close(self) -> None:
        """Give the flash back. Safe to call twice."""
        if self._handle >= 0:
            self._platform.close(self._handle)
            self._handle = -1
