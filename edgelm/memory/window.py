"""Carry the streaming part of a plan out: slots through which weights cycle, filled by readers ahead of the pass.

Readers work in pass order and round the end of a pass, several requests at a time and across the edges of units.
Knows bytes and addresses, no operations; what stays in memory is in `pinned`.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from edgelm.memory.buffer import PAGE, Buffer, align_down
from edgelm.memory.plan import Plan
from edgelm.memory.stores import Store, span
from edgelm.memory.timeline import Times
from edgelm.memory.units import Read, Unit, concatenate, merge, requests

N_READERS = 2
BLOCK_BYTES = 1 << 20


class Run(NamedTuple):
    """A stretch of the pass: one streamed unit, or neighbouring pinned units as one."""

    unit: Unit
    pinned: bool


def runs(plan: Plan) -> tuple[Run, ...]:
    """Return the pass as runs, in order. What a backend copies part by part is also computed so."""
    joined = concatenate if plan.adopts else merge
    result: list[Run] = []
    waiting: list[Unit] = []
    for i, unit in enumerate(plan.units):
        if i in plan.pinned:
            waiting.append(unit)
            continue
        if waiting:
            result.append(Run(joined(waiting), pinned=True))
            waiting = []
        result.append(Run(unit, pinned=False))
    if waiting:
        result.append(Run(joined(waiting), pinned=True))
    return tuple(result)


@dataclass(slots=True)
class _Ahead:
    """A run that is read into a slot. A slot each: one run may be read ahead for two passes."""

    run: int
    slot: int
    waiting: deque[Read]
    n_open: int

    @property
    def done(self) -> bool:
        return self.n_open == 0


class Window:
    """The slots of one model. `hold(i)` gives the address of streamed run `i`, valid until `release(i)`.

    Requests have about `block_bytes`; `n_readers` of them are under way at a time.
    """

    def __init__(
        self,
        store: Store,
        plan: Plan,
        times: Times | None = None,
        *,
        block_bytes: int = BLOCK_BYTES,
        n_readers: int = N_READERS,
    ) -> None:
        self.runs = runs(plan)
        self._store = store
        self._slot_bytes = plan.slot_bytes
        self._slots = Buffer(max(plan.slots_bytes, 1), huge=True)
        self.cycle = tuple(i for i, run in enumerate(self.runs) if not run.pinned)
        self._requests = {i: _blocks(self.runs[i].unit, block_bytes) for i in self.cycle}
        self.bytes_streamed = 0
        self.times = times or Times()
        self._lock = threading.Condition()
        self._free = deque(range(plan.n_slots))
        self._asked: deque[int] = deque()  # runs not yet handed to a reader
        self._ahead: deque[_Ahead] = deque()  # runs that are or were read, in order, not yet held
        self._held: dict[int, int] = {}  # run -> slot
        self._failed: BaseException | None = None
        self._closed = False
        self._n_readers = n_readers
        self._readers: list[threading.Thread] = []

    @property
    def memory_bytes(self) -> int:
        """All memory that the window owns."""
        return self._slots.n_bytes

    def start(self) -> None:
        """Begin to read what the first pass needs."""
        if not self.cycle:
            return
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
        """Return the address of the run's memory; waits until it is read. Raises what the reader raised.

        A run that is held stays where it is.
        """
        with self._lock:
            if run in self._held:
                return self._slots.address + self._held[run] * self._slot_bytes
            if not self._is_read():
                began = time.perf_counter()
                while not self._is_read():
                    self._raise()
                    self._lock.wait()
                self.times.add("wait", run, began)
            ahead = self._ahead.popleft()
            assert ahead.run == run, f"run {run} is held, {ahead.run} was announced"
            self._held[run] = ahead.slot
            return self._slots.address + ahead.slot * self._slot_bytes

    def release(self, run: int) -> None:
        """Give the run's slot to the next read."""
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
        self._slots.release()

    def _is_read(self) -> bool:
        return bool(self._ahead) and self._ahead[0].done

    def _raise(self) -> None:
        if self._failed is not None:
            raise self._failed

    def _next(self) -> tuple[_Ahead, Read] | None:
        """Return the next request, None if there is none for now. The lock is held."""
        if self._failed is not None:
            return None
        if not (self._ahead and self._ahead[-1].waiting):
            if not (self._free and self._asked):
                return None
            run = self._asked.popleft()
            blocks = self._requests[run]
            self._ahead.append(_Ahead(run, self._free.popleft(), deque(blocks), len(blocks)))
            if not self._asked:
                self._asked.extend(self.cycle)
        ahead = self._ahead[-1]
        return ahead, ahead.waiting.popleft()

    def _stream(self) -> None:
        while True:
            with self._lock:
                while not self._closed and (found := self._next()) is None:
                    self._lock.wait()
                if self._closed:
                    return
                assert found is not None
            ahead, block = found
            try:
                at = ahead.slot * self._slot_bytes + block.at
                began = self.times.begin_read()
                self._store.read_into(block.file, block.offset, block.n_bytes, self._slots.view, at)
                self.times.end_read(ahead.run, began, span(block.offset, block.n_bytes))
            except BaseException as exc:
                with self._lock:
                    self._failed = exc
                    self._lock.notify_all()
                return
            with self._lock:
                ahead.n_open -= 1
                if ahead.done:
                    self.bytes_streamed += self.runs[ahead.run].unit.span_bytes
                    self._lock.notify_all()


def _blocks(unit: Unit, block_bytes: int) -> tuple[Read, ...]:
    """Cut the reads of a unit into blocks; neighbours may share a page, which both then read."""
    blocks: list[Read] = []
    for file, offset, n_bytes in requests(unit.parts, block_bytes):
        home = next(
            read for read in unit.reads if read.file == file and 0 <= offset - read.offset < max(read.n_bytes, 1)
        )
        at = home.at + align_down(offset) - align_down(home.offset)
        blocks.append(Read(file, offset, n_bytes, at))
    assert all(block.at % PAGE == 0 for block in blocks)
    return tuple(blocks)
