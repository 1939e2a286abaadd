"""The process's own memory, read without the risk of touching what is not there. Linux only.

The system is asked to write memory into a file of its own: a page that another thread gives back meanwhile is an error
then, not a crash, and it costs a fifth of reading /proc/self/mem. The file also keeps copies out of later searches.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterator
from contextlib import suppress
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.uint64]
Bytes = NDArray[np.uint8]

WORD = 8
_PIECE = 1 << 20
_END_OF_MEMORY = 1 << 63
SEARCH_BYTES = _PIECE + _PIECE // WORD
"""Memory that a search takes."""
_LARGEST_REGION = 64 << 20
"""Larger regions hold weights; objects lie in the heap or in the arenas of threads, which are smaller."""


class Region(NamedTuple):
    start: int
    stop: int
    path: str


def available() -> bool:
    return hasattr(os, "memfd_create") and os.access("/proc/self/maps", os.R_OK)


class Reader:
    """Reads memory by address. A context manager."""

    def __enter__(self) -> Reader:
        self._file = os.memfd_create("edgelm-search")
        os.ftruncate(self._file, _PIECE)
        self._map = mmap.mmap(self._file, _PIECE)
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._file)
        with suppress(BufferError):  # an array of it may live a little longer
            self._map.close()

    def read(self, address: int, n_bytes: int) -> Bytes | None:
        """Return a copy of these bytes, or None if some of them are no memory."""
        out = np.empty(n_bytes, np.uint8)
        for start in range(0, n_bytes, _PIECE):
            piece = out[start : start + _PIECE]
            if self._fill(address + start, len(piece)) != len(piece):
                return None
            piece[:] = np.frombuffer(self._map, np.uint8, len(piece))
        return out

    def words(self, address: int, n_words: int) -> list[int]:
        """Return words of memory; none if some of them are no memory."""
        if self._fill(address, n_words * WORD) != n_words * WORD:
            return []
        found: list[int] = np.frombuffer(self._map, np.uint64, n_words).tolist()
        return found

    def find(self, word: int, region: Region) -> list[int]:
        """Return the addresses of the words of a region that equal `word`."""
        found: list[int] = []
        for start in range(region.start, region.stop, _PIECE):
            n_words = self._fill(start, min(_PIECE, region.stop - start)) // WORD
            words = np.frombuffer(self._map, np.uint64, n_words)
            found += (np.flatnonzero(words == np.uint64(word)) * WORD + start).tolist()
        return found

    def _fill(self, address: int, n_bytes: int) -> int:
        """Copy memory to the beginning of the file; return how many bytes of it there are."""
        if address <= 0 or address + n_bytes > _END_OF_MEMORY:
            return 0
        try:
            return os.pwrite(self._file, (ctypes.c_char * n_bytes).from_address(address), 0)
        except OSError:
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
