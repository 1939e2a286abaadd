"""The process's own memory, read without the risk of touching what is not there. Linux only.

Reads go through /proc/self/mem: a page that another thread gives back meanwhile is an error there, not a crash.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.uint64]
Bytes = NDArray[np.uint8]

WORD = 8
_PIECE = 1 << 20
_MOST_WORDS = 128
SEARCH_BYTES = _PIECE + _PIECE // WORD
"""Memory that a search takes."""
_LARGEST_REGION = 64 << 20
"""Larger regions hold weights; objects lie in the heap or in the arenas of threads, which are smaller."""


class Region(NamedTuple):
    start: int
    stop: int
    path: str


def available() -> bool:
    return os.access("/proc/self/mem", os.R_OK) and os.access("/proc/self/maps", os.R_OK)


class Reader:
    """Reads memory by address. A context manager; it leaves no copies behind that a later search would find."""

    def __enter__(self) -> Reader:
        self._handle = os.open("/proc/self/mem", os.O_RDONLY)
        self._piece, self._words = np.zeros(_PIECE, np.uint8), np.zeros(_MOST_WORDS * WORD, np.uint8)
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._handle)
        self._piece.fill(0)
        self._words.fill(0)

    def read(self, address: int, n_bytes: int) -> Bytes | None:
        """Return a copy of these bytes, or None if some of them are no memory."""
        out = np.empty(n_bytes, np.uint8)
        return out if self._fill(out, address) == n_bytes else None

    def words(self, address: int, n_words: int) -> list[int]:
        """Return words of memory; none if some of them are no memory."""
        out = self._words[: n_words * WORD]
        return out.view(np.uint64).tolist() if self._fill(out, address) == out.nbytes else []

    def find(self, word: int, region: Region) -> Iterator[int]:
        """Yield the addresses of the words of a region that equal `word`."""
        own = [range(array.ctypes.data, array.ctypes.data + array.nbytes) for array in (self._piece, self._words)]
        for start in range(region.start, region.stop, _PIECE):
            n_bytes = self._fill(self._piece[: min(_PIECE, region.stop - start)], start)
            words = self._piece[: n_bytes // WORD * WORD].view(np.uint64)
            for at in np.flatnonzero(words == np.uint64(word)).tolist():
                if not any(start + at * WORD in copies for copies in own):
                    yield start + at * WORD

    def _fill(self, out: Bytes, address: int) -> int:
        try:
            return os.preadv(self._handle, [out.data], address)
        except (OSError, OverflowError):
            return 0


def heaps() -> list[Region]:
    """Return the regions that may hold objects, the heap proper first."""
    found = [region for region, flags in _regions() if flags.startswith("rw") and region.path in ("", "[heap]")]
    small = [region for region in found if region.path or region.stop - region.start <= _LARGEST_REGION]
    return sorted(small, key=lambda region: not region.path)


def data_of(module: str) -> list[Region]:
    """Return where the file of a library whose name contains `module` is mapped, but for its code."""
    return [region for region, flags in _regions() if module in region.path and "x" not in flags]


def forget(address: int, n_bytes: int) -> None:
    """Fill memory with zeros, and give its whole pages back."""
    page = mmap.PAGESIZE
    first, last = -(-address // page) * page, (address + n_bytes) // page * page
    if first >= last:
        ctypes.memset(address, 0, n_bytes)
        return
    ctypes.memset(address, 0, first - address)
    ctypes.memset(last, 0, address + n_bytes - last)
    libc = ctypes.CDLL(None)
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    if libc.madvise(first, last - first, mmap.MADV_DONTNEED):
        ctypes.memset(first, 0, last - first)


def _regions() -> Iterator[tuple[Region, str]]:
    with open("/proc/self/maps") as lines:
        for line in lines:
            span, flags, _, _, _, *path = line.split(maxsplit=5)
            start, stop = (int(edge, 16) for edge in span.split("-"))
            yield Region(start, stop, path[0].strip() if path else ""), flags
