"""Carry a plan out: the only owner of weight memory.

Pinned runs are read once; streamed units cycle through slots, filled by reader threads that work ahead in pass
order and round the end of a pass. Knows bytes and addresses, no operations.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from edgelm.errors import Cancelled
from edgelm.memory.buffer import Buffer, align_down
from edgelm.memory.plan import Plan
from edgelm.memory.stores import Store
from edgelm.memory.units import Read, Unit, merge
from edgelm.memory.verified import VerifiedStore

N_READERS = 2
LOAD_BYTES = 8 << 20
"""Pinned runs are loaded in pieces of this size, so that several threads share a large one and progress is seen."""


@dataclass(frozen=True, slots=True)
class Run:
    """A stretch of the pass: one streamed unit, or neighbouring pinned units as one."""

    unit: Unit
    pinned: bool


def runs(plan: Plan) -> tuple[Run, ...]:
    """Return the pass as runs, in order."""
    result: list[Run] = []
    waiting: list[Unit] = []
    for i, unit in enumerate(plan.units):
        if i in plan.pinned:
            waiting.append(unit)
            continue
        if waiting:
            result.append(Run(merge(waiting), pinned=True))
            waiting = []
        result.append(Run(unit, pinned=False))
    if waiting:
        result.append(Run(merge(waiting), pinned=True))
    return tuple(result)


@dataclass(slots=True)
class _Ahead:
    """A run that a reader has begun to read into a slot. A slot each: one run may be read ahead for two passes."""

    run: int
    slot: int
    done: bool = False


def _load_pieces(read: Read, loader: Store) -> Iterator[tuple[int, int]]:
    """Yield the first and last offsets of the pieces that `read` is loaded in; no checksum is cut apart."""
    start, end = read.offset, read.offset + read.n_bytes
    while start < end:
        stop = start + LOAD_BYTES
        stop = min(loader.edge(stop) if isinstance(loader, VerifiedStore) else stop, end)
        yield start, stop
        start = stop


class Window:
    """Weight memory of one model. `hold(i)` gives the address of run `i`, valid until `release(i)`.

    `store` serves what is streamed, `loader` (the same by default) what is read once and stays.
    """

    def __init__(
        self, store: Store, plan: Plan, constants: Unit, *, loader: Store | None = None, n_readers: int = N_READERS
    ) -> None:
        self.runs = runs(plan)
        self._store, self._loader = store, loader or store
        pinned = [run.unit for run in self.runs if run.pinned]
        self._constants = constants
        total = constants.span_bytes + sum(unit.span_bytes for unit in pinned)
        self._pinned = Buffer(max(total, 1), huge=True)
        self._slot_bytes = plan.slot_bytes
        self._slots = Buffer(max(plan.slots_bytes, 1), huge=True)
        self._places: dict[int, int] = {}
        at = constants.span_bytes
        for i, run in enumerate(self.runs):
            if run.pinned:
                self._places[i] = at
                at += run.unit.span_bytes
        self.cycle = tuple(i for i, run in enumerate(self.runs) if not run.pinned)
        self.bytes_streamed = 0
        self.wait_s = 0.0
        self._lock = threading.Condition()
        self._free = deque(range(plan.n_slots))
        self._asked: deque[int] = deque()  # runs not yet handed to a reader
        self._ahead: deque[_Ahead] = deque()  # runs a reader has begun or finished, in order, not yet held
        self._held: dict[int, int] = {}  # run -> slot
        self._failed: BaseException | None = None
        self._closed = False
        self._n_readers = n_readers
        self._readers: list[threading.Thread] = []

    @property
    def constants_address(self) -> int:
        return self._pinned.address

    @property
    def memory_bytes(self) -> int:
        """All memory that the window owns."""
        return self._pinned.n_bytes + self._slots.n_bytes

    def load(
        self, progress: Callable[[int, int], None] | None = None, cancelled: Callable[[], bool] | None = None
    ) -> None:
        """Read everything pinned, then start streaming. `progress(done, total)` is called as bytes arrive."""
        pieces = [(self._constants, 0), *((self.runs[i].unit, at) for i, at in self._places.items())]
        requests = deque(
            (read.file, start, stop - start, base + read.at + align_down(start) - align_down(read.offset))
            for unit, base in pieces
            for read in unit.reads
            for start, stop in _load_pieces(read, self._loader)
        )
        total = sum(n_bytes for _, _, n_bytes, _ in requests)
        done = 0
        failures: list[BaseException] = []

        def work() -> None:
            nonlocal done
            while not failures:
                with self._lock:
                    if not requests:
                        return
                    file, offset, n_bytes, at = requests.popleft()
                try:
                    if cancelled is not None and cancelled():
                        raise Cancelled("loading was stopped")
                    self._loader.read_into(file, offset, n_bytes, self._pinned.view, at)
                    with self._lock:
                        done += n_bytes
                        if progress is not None:
                            progress(done, total)
                except BaseException as exc:
                    failures.append(exc)
                    return

        helpers = [threading.Thread(target=work, daemon=True) for _ in range(self._n_readers - 1)]
        for thread in helpers:
            thread.start()
        work()
        for thread in helpers:
            thread.join()
        if failures:
            raise failures[0]
        if self.cycle:
            self._asked.extend(self.cycle)
            for i in range(self._n_readers):
                thread = threading.Thread(target=self._stream, name=f"edgelm-reader-{i}", daemon=True)
                thread.start()
                self._readers.append(thread)

    def begin(self, order: Sequence[int]) -> None:
        """Announce the streamed runs that the coming pass will hold, in order; reads go on from there.

        What was read ahead is kept if the pass begins with it, which every pass from the first block does.
        """
        if not order:
            return  # the pass holds pinned runs only: what was read ahead is for the next one
        with self._lock:
            coming = [*order, *self.cycle]
            pending = [ahead.run for ahead in self._ahead]
            keep = len(pending) if pending == coming[: len(pending)] else 0
            if not keep:
                while not all(ahead.done for ahead in self._ahead):  # let running reads finish
                    self._raise()
                    self._lock.wait()
                self._free.extend(ahead.slot for ahead in self._ahead)
                self._ahead.clear()
            self._asked = deque(coming[keep:] or self.cycle)
            self._lock.notify_all()

    def hold(self, run: int) -> int:
        """Return the address of the run's memory; waits until it is read. Raises what the reader raised."""
        place = self._places.get(run)
        if place is not None:
            return self._pinned.address + place
        with self._lock:
            if not self._is_read():
                began = time.perf_counter()
                while not self._is_read():
                    self._raise()
                    self._lock.wait()
                self.wait_s += time.perf_counter() - began
            ahead = self._ahead.popleft()
            assert ahead.run == run, f"run {run} is held, {ahead.run} was announced"
            self._held[run] = ahead.slot
            return self._slots.address + ahead.slot * self._slot_bytes

    def release(self, run: int) -> None:
        """Give the run's slot to the next read."""
        if run in self._places:
            return
        with self._lock:
            self._free.append(self._held.pop(run))
            self._lock.notify_all()

    def reset(self) -> None:
        """Take back what a broken-off pass still holds."""
        with self._lock:
            self._free.extend(self._held.values())
            self._held.clear()
            self._lock.notify_all()

    def close(self) -> None:
        """Stop the readers and return all memory."""
        with self._lock:
            self._closed = True
            self._lock.notify_all()
        for thread in self._readers:
            thread.join()
        for buffer in (self._pinned, self._slots):
            buffer.release()

    def _is_read(self) -> bool:
        return bool(self._ahead) and self._ahead[0].done

    def _raise(self) -> None:
        if self._failed is not None:
            raise self._failed

    def _stream(self) -> None:
        while True:
            with self._lock:
                while not self._closed and not (self._free and self._asked and self._failed is None):
                    self._lock.wait()
                if self._closed:
                    return
                ahead = _Ahead(self._asked.popleft(), self._free.popleft())
                self._ahead.append(ahead)
                if not self._asked:
                    self._asked.extend(self.cycle)
            try:
                unit = self.runs[ahead.run].unit
                base = ahead.slot * self._slot_bytes
                for read in unit.reads:
                    self._store.read_into(read.file, read.offset, read.n_bytes, self._slots.view, base + read.at)
            except BaseException as exc:
                with self._lock:
                    self._failed = exc
                    self._lock.notify_all()
                return
            with self._lock:
                self.bytes_streamed += unit.span_bytes
                ahead.done = True
                self._lock.notify_all()
