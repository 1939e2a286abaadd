"""Merge neighbouring symbols in order of rank: the loop of byte-pair encoding, for merges by pair and by text.

Equal ranks merge from left to right. Time is n log n in the length of the run, memory linear. Knows no vocabulary.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from heapq import heapify, heappop, heappush
from itertools import pairwise

_SHORT = 24  # up to here, searching the whole run for the best pair beats the heap


def merge_pairs(symbols: list[int], pair: Callable[[int, int], int]) -> list[int]:
    """Return `symbols` after all merges; `pair(left, right)` is `rank << 32 | result`, or -1."""
    if len(symbols) < 2:
        return symbols
    if len(symbols) > _SHORT:
        return _merge_long(symbols, pair)
    ranks = [pair(left, right) for left, right in pairwise(symbols)]
    while True:
        best, at = -1, -1
        for index, rank in enumerate(ranks):
            if rank >= 0 and (best < 0 or rank < best):
                best, at = rank, index
        if at < 0:
            return symbols
        symbols[at : at + 2] = [best & 0xFFFFFFFF]
        del ranks[at]
        if at > 0:
            ranks[at - 1] = pair(symbols[at - 1], symbols[at])
        if at < len(ranks):
            ranks[at] = pair(symbols[at], symbols[at + 1])


def _merge_long(symbols: list[int], pair: Callable[[int, int], int]) -> list[int]:
    n = len(symbols)
    following, preceding = array("q", range(1, n + 1)), array("q", range(-1, n - 1))
    # A merge waits as rank << 64 | position << 32 | result: it is stale if the pair there now merges otherwise.
    heap: list[int] = []
    waiting = array("q", bytes(8 * n))

    def offer(at: int) -> int:
        after = following[at]
        found = pair(symbols[at], symbols[after]) if after < n else -1
        waiting[at] = found
        return (found >> 32) << 64 | at << 32 | found & 0xFFFFFFFF if found >= 0 else -1

    heap = [entry for at in range(n) if (entry := offer(at)) >= 0]
    heapify(heap)
    while heap:
        entry = heappop(heap)
        at = entry >> 32 & 0xFFFFFFFF
        if symbols[at] < 0 or waiting[at] != ((entry >> 64) << 32 | entry & 0xFFFFFFFF):
            continue
        gone = following[at]
        symbols[at] = entry & 0xFFFFFFFF
        symbols[gone] = _GONE
        waiting[gone] = -1
        following[at] = after = following[gone]
        if after < n:
            preceding[after] = at
        if (fresh := offer(at)) >= 0:
            heappush(heap, fresh)
        before = preceding[at]
        if before >= 0 and (fresh := offer(before)) >= 0:
            heappush(heap, fresh)
    return [symbol for symbol in symbols if symbol != _GONE]


_GONE = -2
