"""How long the compute thread and the readers did what: sums always, single events while someone records.

Knows kinds and numbers of things and a clock; not what they are.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from edgelm.errors import ConfigError

Kind = Literal["read", "wait", "compute", "sample", "token"]
KINDS: tuple[Kind, ...] = get_args(Kind)
CAPACITY = 65_536
"""Events that a timeline keeps: up to 1.9 MB, taken as they come. The reserve of every plan holds that."""
_ROW = np.dtype([("kind", "u1"), ("index", "u4"), ("begin_s", "f8"), ("end_s", "f8"), ("n_bytes", "u8")])


@dataclass(frozen=True, slots=True)
class Event:
    """One thing that happened; times count from the start of the recording.

    `read`: a reader fetched run `index`, or keys and values of layer `index`.
    `wait`: the compute thread waited for that run. `compute`: the program of run
    `index` ran. `sample`: token number `index` was chosen. `token`: it was handed on, a moment without length.
    """

    kind: Kind
    index: int
    begin_s: float
    end_s: float
    n_bytes: int


class Timeline:
    """What happened during a recording (`Model.record`), up to `capacity` events; `dropped` says how many more came."""

    def __init__(self, capacity: int = CAPACITY) -> None:
        self.start_s = time.perf_counter()
        self.dropped = 0
        self._rows = np.zeros(capacity, _ROW)  # not a list of objects: that would take five times the memory
        self._n_rows = 0

    def add(self, kind: Kind, index: int, begin_s: float, end_s: float, n_bytes: int) -> None:
        if self._n_rows == len(self._rows):
            self.dropped += 1
            return
        self._rows[self._n_rows] = (KINDS.index(kind), index, begin_s, end_s, n_bytes)
        self._n_rows += 1

    def events(self) -> tuple[Event, ...]:
        """Return the events in order of their ends."""
        start_s = self.start_s
        return tuple(
            Event(KINDS[kind], index, begin_s - start_s, end_s - start_s, n_bytes)
            for kind, index, begin_s, end_s, n_bytes in self._rows[: self._n_rows].tolist()
        )


class Times:
    """The sums of one model, and its recording if there is one. Any thread may add."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sums_s = dict.fromkeys(KINDS, 0.0)
        self._n_reading = 0
        self._reading_since_s = 0.0
        self._timeline: Timeline | None = None

    def add(self, kind: Kind, index: int, begin_s: float, n_bytes: int = 0) -> None:
        """Something that began at `begin_s` (of `time.perf_counter`) has just ended."""
        end_s = time.perf_counter()
        with self._lock:
            self._sums_s[kind] += end_s - begin_s
            if self._timeline is not None:
                self._timeline.add(kind, index, begin_s, end_s, n_bytes)

    def begin_read(self) -> float:
        """A read begins: return what `end_read` needs."""
        now_s = time.perf_counter()
        with self._lock:
            if not self._n_reading:
                self._reading_since_s = now_s
            self._n_reading += 1
        return now_s

    def end_read(self, index: int, begin_s: float, n_bytes: int) -> None:
        """A read has ended. Reads that overlap are summed once: it is the flash that was busy."""
        end_s = time.perf_counter()
        with self._lock:
            self._n_reading -= 1
            if not self._n_reading:
                self._sums_s["read"] += end_s - self._reading_since_s
            if self._timeline is not None:
                self._timeline.add("read", index, begin_s, end_s, n_bytes)

    def sums_s(self) -> dict[Kind, float]:
        """Return the seconds of each kind so far; reads that are under way count up to now."""
        with self._lock:
            sums_s = dict(self._sums_s)
            if self._n_reading:
                sums_s["read"] += time.perf_counter() - self._reading_since_s
        return sums_s

    @contextmanager
    def recording(self) -> Iterator[Timeline]:
        """Keep single events while inside. Raises `ConfigError` if somebody records already."""
        with self._lock:
            if self._timeline is not None:
                raise ConfigError("this model is being recorded already; end that recording first")
            self._timeline = timeline = Timeline()
        try:
            yield timeline
        finally:
            with self._lock:
                self._timeline = None
