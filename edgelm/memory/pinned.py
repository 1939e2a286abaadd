"""Weights that stay in memory: every byte lies where it lies in its file, in address space reserved for the whole.

So an address never changes: when a budget grows or shrinks, pages are read or given back and nothing moves. Knows
bytes of files and threads that load them; knows no plan and no operation.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence

from edgelm.errors import Cancelled
from edgelm.memory.buffer import HUGE_PAGE, Buffer, align_down, align_up
from edgelm.memory.stores import Store
from edgelm.memory.units import Part, requests

LOAD_BYTES = 8 << 20
"""Weights are loaded in pieces of about this size, so that several threads share a large one and progress is seen."""

Ranges = list[tuple[int, int]]


class PinnedWeights:
    """The resident part of a model's files, which are `file_bytes` long. Empty until `keep` is called."""

    def __init__(self, file_bytes: Sequence[int]) -> None:
        self._buffers = [Buffer(align_up(max(n_bytes, 1)), sparse=True) for n_bytes in file_bytes]
        self._held: list[Ranges] = [[] for _ in file_bytes]
        self._huge: list[Ranges] = [[] for _ in file_bytes]
        self._lock = threading.Lock()

    @property
    def memory_bytes(self) -> int:
        """Memory in use: whole pages."""
        return sum(stop - start for held in self._held for start, stop in _pages(held))

    def address(self, file: int, offset: int) -> int:
        """Return where the byte at `offset` of `file` lies, or would lie, in memory."""
        return self._buffers[file].address + offset

    def keep(
        self,
        parts: Iterable[Part],
        store: Store,
        n_readers: int = 2,
        progress: Callable[[int, int], None] | None = None,
        cancelled: Callable[[], bool] | None = None,
    ) -> None:
        """Hold these parts and nothing else: pages of others are given back first, what is missing is read.

        `progress(done, total)` is called as bytes arrive. Raises what `store` raises; then some pages may be missing.
        """
        asked = requests(parts, LOAD_BYTES)
        wanted: list[Ranges] = [[] for _ in self._buffers]
        for file, offset, n_bytes in asked:
            wanted[file].append((offset, offset + n_bytes))
        for file, ranges in enumerate(wanted):
            self._make_room(file, _pages(ranges))
        missing = [
            (file, offset, n_bytes)
            for file, offset, n_bytes in asked
            if not _covers(self._held[file], offset, offset + n_bytes)
        ]
        _read_all(self._reader(store, missing, progress, cancelled), n_readers)
        self._held = [_merged([*held, *ranges]) for held, ranges in zip(self._held, wanted, strict=True)]

    def _make_room(self, file: int, wanted: Ranges) -> None:
        """Give back what is not wanted, and say which pages may be huge: those inside one stretch that stays."""
        buffer, held = self._buffers[file], self._held[file]
        huge = [(align_up(start, HUGE_PAGE), align_down(stop, HUGE_PAGE)) for start, stop in wanted]
        huge = [(start, stop) for start, stop in huge if start < stop]
        # a huge page that is given back in part keeps all of its memory, so it goes as a whole
        broken = _without(self._huge[file], huge)
        for start, stop in broken:
            buffer.advise_huge(start, stop, False)
        gone = _merged([*broken, *_without(_pages(held), wanted)])
        for start, stop in gone:
            buffer.discard(start, stop)
        for start, stop in _without(huge, self._huge[file]):
            buffer.advise_huge(start, stop, True)
        self._held[file] = _without(held, gone)
        self._huge[file] = huge

    def _reader(
        self,
        store: Store,
        missing: Sequence[tuple[int, int, int]],
        progress: Callable[[int, int], None] | None,
        cancelled: Callable[[], bool] | None,
    ) -> Callable[[], bool]:
        """Return a function that reads one more request, and says whether there was one."""
        waiting, total, done = deque(missing), sum(n_bytes for _, _, n_bytes in missing), 0

        def read_one() -> bool:
            nonlocal done
            with self._lock:
                if not waiting:
                    return False
                file, offset, n_bytes = waiting.popleft()
            if cancelled is not None and cancelled():
                raise Cancelled("loading was stopped")
            store.read_into(file, offset, n_bytes, self._buffers[file].view, align_down(offset))
            with self._lock:
                done += n_bytes
                if progress is not None:
                    progress(done, total)
            return True

        return read_one

    def close(self) -> None:
        """Return all memory. Safe to call twice."""
        for buffer in self._buffers:
            buffer.release()


def _read_all(read_one: Callable[[], bool], n_readers: int) -> None:
    """Call `read_one` in several threads until nothing is left or one of them fails."""
    failures: list[BaseException] = []

    def work() -> None:
        try:
            while not failures and read_one():
                pass
        except BaseException as exc:
            failures.append(exc)

    helpers = [threading.Thread(target=work, daemon=True) for _ in range(n_readers - 1)]
    for thread in helpers:
        thread.start()
    work()
    for thread in helpers:
        thread.join()
    if failures:
        raise failures[0]


def _pages(ranges: Ranges) -> Ranges:
    """Return the whole pages that hold these bytes."""
    return _merged([(align_down(start), align_up(stop)) for start, stop in ranges])


def _merged(ranges: Ranges) -> Ranges:
    """Return the union of ranges, in order."""
    merged: Ranges = []
    for start, stop in sorted(ranges):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(stop, merged[-1][1]))
        else:
            merged.append((start, stop))
    return merged


def _without(ranges: Ranges, others: Ranges) -> Ranges:
    """Return what of `ranges` is in none of `others`; both are in order and free of overlaps."""
    left: Ranges = []
    for start, stop in ranges:
        for other_start, other_stop in others:
            if other_stop <= start or other_start >= stop:
                continue
            if start < other_start:
                left.append((start, other_start))
            start = max(start, other_stop)
        if start < stop:
            left.append((start, stop))
    return left


def _covers(ranges: Ranges, start: int, stop: int) -> bool:
    return any(a <= start and stop <= b for a, b in ranges)
