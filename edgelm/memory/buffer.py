"""Page-aligned anonymous memory that goes back to the operating system when it is released.

Knows nothing of what is stored in it; the window, the arena and the engine's scratch are built on it.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from types import TracebackType

from edgelm.errors import ConfigError, EdgeLMError
from edgelm.sizes import human

PAGE = 4096
"""Alignment of offset, length and address that direct reads need everywhere; not the page size of the system."""

HUGE_PAGE = 2 << 20
"""Size of a huge page where small pages have 4096 bytes."""


class OutOfMemory(EdgeLMError):
    """The operating system refused an allocation."""


def align_up(n_bytes: int, to: int = PAGE) -> int:
    """Return the smallest multiple of `to` that is at least `n_bytes`."""
    return -(-n_bytes // to) * to


def align_down(n_bytes: int, to: int = PAGE) -> int:
    """Return the largest multiple of `to` that is at most `n_bytes`."""
    return n_bytes // to * to


class Buffer:
    """`n_bytes` of zeroed private memory at a page-aligned `address`.

    Pages count against the process only once they are written, and never more than `n_bytes` of them.
    `huge` asks for (True) or forbids (False) transparent huge pages, where the system has them; None leaves
    its default. Direct reads into huge pages were measured at twice the speed: far fewer pages to pin and to
    hand to the disk one by one. `sparse`: address space of which only some pages will be used; `advise_huge` then
    says which of them may be huge.
    """

    __slots__ = ("_map", "_start", "_view", "address", "n_bytes")

    def __init__(self, n_bytes: int, *, huge: bool | None = None, sparse: bool = False) -> None:
        if n_bytes <= 0:
            raise ConfigError(f"a buffer needs at least one byte, got {n_bytes}")
        huge = False if sparse else huge
        slack = HUGE_PAGE if (huge or sparse) and n_bytes >= HUGE_PAGE else 0  # address space only: never touched
        try:
            self._map: mmap.mmap | None = _anonymous(n_bytes + slack)
        except (OSError, OverflowError) as exc:
            raise OutOfMemory(f"the system refused {human(n_bytes)} of memory ({exc}); lower --memory") from exc
        self.n_bytes = n_bytes
        # the ctypes object dies in this line, so that it does not keep the map from being closed
        base = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        self.address: int = align_up(base, HUGE_PAGE) if slack else base
        self._start = self.address - base
        if huge is not None:
            # whole huge pages only: one that reached past the end would hold memory that nobody counted
            _advise_huge(self._map, huge, self._start, align_down(n_bytes, HUGE_PAGE) if huge else n_bytes)
        self._view: memoryview | None = memoryview(self._map)[self._start : self._start + n_bytes]

    @property
    def view(self) -> memoryview:
        """All bytes, writable. Slices and arrays made of it must be dropped before `release`."""
        assert self._view is not None, "buffer used after release"
        return self._view

    def advise_huge(self, start: int, stop: int, huge: bool) -> None:
        """Let [start, stop), multiples of `HUGE_PAGE` in a sparse buffer, take huge pages or no longer."""
        assert self._map is not None, "buffer used after release"
        _advise_huge(self._map, huge, self._start + start, stop - start)

    def discard(self, start: int, stop: int) -> None:
        """Give the whole system pages inside [start, stop) back; they are zero on Linux, undefined elsewhere.

        Bytes of pages that lie only partly inside keep their content.
        """
        assert self._map is not None, "buffer used after release"
        assert 0 <= start <= stop <= self.n_bytes
        first, last = align_up(start, mmap.PAGESIZE), align_down(stop, mmap.PAGESIZE)
        if stop == self.n_bytes:
            last = align_up(stop, mmap.PAGESIZE)
        if first < last:
            _give_back(self._map, self._start + first, last - first)

    def release(self) -> None:
        """Return the memory to the system at once. Safe to call twice.

        If a slice or an array of `view` is still alive, its pages go all the same, and only the
        address range stays reserved until that view dies.
        """
        if self._map is None:
            return
        mapped, self._map = self._map, None
        view, self._view = self._view, None
        try:
            if view is not None:
                view.release()
            mapped.close()
        except BufferError:
            _give_back(mapped, self._start, align_up(self.n_bytes, mmap.PAGESIZE))

    def __enter__(self) -> Buffer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def _anonymous(n_bytes: int) -> mmap.mmap:
    if sys.platform == "win32":
        return mmap.mmap(-1, n_bytes)
    # private: pages of a shared anonymous map belong to tmpfs, and MADV_DONTNEED would not free them
    return mmap.mmap(-1, n_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


def _advise_huge(mapped: mmap.mmap, huge: bool, start: int, n_bytes: int) -> None:
    advice = getattr(mmap, "MADV_HUGEPAGE" if huge else "MADV_NOHUGEPAGE", None)
    if advice is None or n_bytes == 0:
        return
    try:
        mapped.madvise(advice, start, n_bytes)
    except OSError:
        return  # a kernel built without huge pages: the same memory in small ones


_MACOS_MADV_FREE_REUSABLE = 7  # the only advice there that takes the pages off phys_footprint at once


def _give_back(mapped: mmap.mmap, start: int, n_bytes: int) -> None:
    if sys.platform == "win32":
        # unlocking pages that are not locked takes them out of the working set (documented by VirtualUnlock)
        base = ctypes.addressof(ctypes.c_char.from_buffer(mapped))
        ctypes.windll.kernel32.VirtualUnlock(ctypes.c_void_p(base + start), ctypes.c_size_t(n_bytes))
    elif sys.platform in ("darwin", "ios"):
        mapped.madvise(_MACOS_MADV_FREE_REUSABLE, start, n_bytes)
    else:
        mapped.madvise(mmap.MADV_DONTNEED, start, n_bytes)
