"""Put memory that a library has filled into huge pages, where Linux can do that afterwards (6.1 and newer).

A pass reads every weight once: with small pages it spends a part of its time on looking up where they are. The
library allocates its own memory and does not ask for huge pages. Elsewhere nothing happens.
"""

from __future__ import annotations

import ctypes
import re
import time
from typing import NamedTuple

HUGE_BYTES = 2 << 20
LEAST_BYTES = 4 << 20
FULL = 0.98
"""Share of a region that must be in use: the rest would be filled, and nobody has counted it."""
LIMIT_S = 1.0
"""Where free memory is in pieces, the kernel has to move other pages first; no start waits longer for it than this."""
_PIECE_BYTES = 16 << 20
_MADV_COLLAPSE = 25
_RESIDENT = re.compile(r"Rss:\s+(\d+) kB")


class Region(NamedTuple):
    """Anonymous writable memory, and how much of it is in use."""

    start: int
    stop: int
    used_bytes: int


def regions() -> tuple[Region, ...]:
    """Return this process's anonymous memory; nothing where the system does not tell."""
    try:
        with open("/proc/self/smaps", encoding="utf-8", errors="replace") as lines:
            found: list[Region] = []
            span: tuple[int, int] | None = None
            for line in lines:
                if line[0] in "0123456789abcdef":
                    place, flags, _, _, _, *path = line.split(maxsplit=5)
                    start, stop = (int(edge, 16) for edge in place.split("-"))
                    span = (start, stop) if flags == "rw-p" and not path else None
                elif span is not None and (used := _RESIDENT.match(line)):
                    found.append(Region(*span, int(used[1]) << 10))
            return tuple(found)
    except OSError:
        return ()


def collapse_since(before: tuple[Region, ...]) -> int:
    """Put what has come since `before`, and is in use almost whole, into huge pages; return for how many bytes."""
    advise = getattr(ctypes.CDLL(None), "madvise", None) if before else None
    if advise is None:
        return 0
    advise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    done, until_s = 0, time.perf_counter() + LIMIT_S
    for region in regions():
        if region.stop - region.start < LEAST_BYTES or region.used_bytes < FULL * (region.stop - region.start):
            continue
        for start, stop in _without(region, before):
            first = -(-start // HUGE_BYTES) * HUGE_BYTES
            for at in range(first, stop - HUGE_BYTES + 1, _PIECE_BYTES):
                n_bytes = min(_PIECE_BYTES, (stop - at) // HUGE_BYTES * HUGE_BYTES)
                if time.perf_counter() > until_s or advise(at, n_bytes, _MADV_COLLAPSE):
                    return done
                done += n_bytes
    return done


def _without(region: Region, others: tuple[Region, ...]) -> list[tuple[int, int]]:
    """Return the parts of a region that are in none of `others`, which are in order."""
    parts, start = [], region.start
    for other in others:
        if other.stop <= start or other.start >= region.stop:
            continue
        if start < other.start:
            parts.append((start, other.start))
        start = max(start, other.stop)
    return [*parts, (start, region.stop)] if start < region.stop else parts
