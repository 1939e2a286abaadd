"""Make glibc's malloc return freed memory to the system, so that it does not stay in the process.

Knows no sizes of edgelm. Other C libraries return large blocks by themselves; there both calls do nothing.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Protocol

# numbers of mallopt(3), from malloc.h
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8


class _CLibrary(Protocol):
    @property
    def mallopt(self) -> Callable[[int, int], int]: ...
    @property
    def malloc_trim(self) -> Callable[[int], int]: ...


def _glibc() -> _CLibrary | None:
    try:
        library = ctypes.CDLL(None)
    except (OSError, TypeError):  # Windows has no such handle
        return None
    return library if hasattr(library, "gnu_get_libc_version") else None


def tune_allocator(library: _CLibrary | None = None) -> bool:
    """Have blocks of 64 KiB and more come and go with the system, in two arenas at most; False where unknown.

    Setting the threshold also stops glibc from raising it to 32 MiB after the first large block is freed.
    Call it before threads start: arenas that exist are not taken away.
    """
    library = library or _glibc()
    if library is None:
        return False
    wanted = ((_M_MMAP_THRESHOLD, 64 << 10), (_M_TRIM_THRESHOLD, 128 << 10), (_M_ARENA_MAX, 2))
    accepted = [library.mallopt(option, value) == 1 for option, value in wanted]
    return all(accepted)


def trim(library: _CLibrary | None = None) -> bool:
    """Return free pages inside the allocator's heaps to the system; True if there were any."""
    library = library or _glibc()
    return library is not None and library.malloc_trim(0) == 1
