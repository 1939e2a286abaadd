"""What edgelm asks of an operating system: files without a page cache, memory counters, cores.

Knows no system itself. Each one is a class in its own module, and takes its roots and libraries as
arguments so that tests can put doubles in their place.
"""

from __future__ import annotations

import os
from typing import NamedTuple, Protocol


class Pressure(NamedTuple):
    """How short memory is at one moment. What a system does not tell is 0.

    `stalled` is the share of the last ten seconds in which some task waited for memory. `limit_hits` counts how often
    a limit of this process' control groups was met: what matters is whether it grows. `level` is the system's own
    verdict: 0 calm, 1 short, 2 critical.
    """

    total_bytes: int
    available_bytes: int
    stalled: float = 0.0
    limit_hits: int = 0
    level: int = 0


class Platform(Protocol):
    """The seam to the operating system. Handles are integers that only the same platform understands."""

    name: str
    direct_how: str
    """How direct reads avoid the page cache here, in two or three words."""

    def open_direct(self, path: str) -> int:
        """Open for reads that bypass the page cache. Offset, length and address must be multiples of 4096.

        Raises `OSError` where the file system refuses.
        """
        ...

    def open_buffered(self, path: str) -> int:
        """Open for ordinary reads without readahead."""
        ...

    def read(self, handle: int, view: memoryview, offset: int, *, uncached: bool = False) -> int:
        """Read into `view` from `offset` and return the bytes read, 0 at the end. Thread-safe.

        `uncached` asks a buffered handle to leave no page cache; `OSError` if that cannot be had.
        """
        ...

    def open_scratch(self, path: str, n_bytes: int) -> int:
        """Make a file of `n_bytes` for direct reads and writes, which is gone once it is closed, however that happens.

        Offset, length and address must be multiples of 4096. Raises `OSError` where the file system refuses, or has
        too little room.
        """
        ...

    def write(self, handle: int, view: memoryview, offset: int) -> int:
        """Write `view` at `offset` of a scratch file and return the bytes written. Thread-safe."""
        ...

    def identity(self, handle: int) -> tuple[int, int]:
        """Return (size in bytes, time of change in ns) of the open file."""
        ...

    def drop_cache(self, handle: int) -> None:
        """Take the whole file out of the page cache, as far as the system has a way to."""
        ...

    def cached_bytes(self, handle: int, offset: int, n_bytes: int) -> int:
        """Return how many of the bytes are in the page cache; 0 where the system does not tell."""
        ...

    def close(self, handle: int) -> None: ...

    def memory_counters(self) -> tuple[int, int, int, int]:
        """Return (resident, peak resident, anonymous, file-backed) bytes of this process.

        Resident is what the budget counts; the peak is since the process began, or since `reset_peak`.
        """
        ...

    def rss_bytes(self) -> int:
        """Return the resident bytes of this process, as the budget counts them."""
        ...

    def peak_rss_bytes(self) -> int:
        """Return the largest `rss_bytes` since the process began (or since `reset_peak`)."""
        ...

    def reset_peak(self) -> bool:
        """Start the peak again from now; False where the system cannot."""
        ...

    def available_bytes(self) -> int:
        """Return what the device can give to new memory without swapping, limits of containers included."""
        ...

    def total_bytes(self) -> int:
        """Return the memory of the device, or of the container where that is less."""
        ...

    def pressure(self) -> Pressure:
        """Return how short memory is now. Cheap enough to be asked several times a second."""
        ...

    def cores(self) -> int:
        """Return the physical cores that this process may really use; at least 1."""
        ...


class PosixFiles:
    """The file half of a platform for systems with positional reads."""

    def open_buffered(self, path: str) -> int:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def read(self, handle: int, view: memoryview, offset: int, *, uncached: bool = False) -> int:
        if uncached:
            raise OSError("this system has no uncached buffered reads")
        return os.preadv(handle, [view], offset)

    def write(self, handle: int, view: memoryview, offset: int) -> int:
        return os.pwritev(handle, [view], offset)

    def _open_unlinked(self, path: str, n_bytes: int, flags: int = 0) -> int:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | flags, 0o600)
        try:
            os.unlink(path)
            os.truncate(handle, n_bytes)
        except BaseException:
            os.close(handle)
            raise
        return handle

    def identity(self, handle: int) -> tuple[int, int]:
        facts = os.fstat(handle)
        return facts.st_size, facts.st_mtime_ns

    def cached_bytes(self, handle: int, offset: int, n_bytes: int) -> int:
        return 0  # no portable way to ask

    def close(self, handle: int) -> None:
        os.close(handle)
