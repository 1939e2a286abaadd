"""How the flash of a device is best read: blocks of which size, how many at once, and what that costs the processor.

Measures through a store, as the window reads. Knows numbered files and bytes; keeps nothing and plans nothing.
"""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from math import inf
from typing import NamedTuple

from edgelm.memory.buffer import PAGE, Buffer, align_down, align_up
from edgelm.memory.stores import Store
from edgelm.sizes import GB, KIB, MIB

BLOCKS = (128 * KIB, 256 * KIB, 512 * KIB, 1 * MIB, 2 * MIB, 4 * MIB)
PARALLEL = (1, 2, 4, 8)
MAX_FLYING_BYTES = 8 * MIB
"""More bytes in flight than slots have room for are not worth knowing about."""
ENOUGH_BYTES = 12 * MIB
"""A file must hold as much, else reading it again and again says more about caches than about the device."""
REFRESH_S, QUICK_S, THOROUGH_S = 0.06, 0.3, 2.5
WORTH = 0.03
"""A pattern with fewer bytes in flight is preferred if it is slower by no more than this share."""
_HOPELESS, _BEHIND = 0.75, 0.9
"""Patterns below these shares of the best get no further turns: in the first rounds, and once there were enough."""
_N_ROUNDS, _ENOUGH_ROUNDS = 8, 3
_TURN_S = 0.004
_LEAST_PARALLEL = 2
"""With a single read in flight the flash rests whenever the reader waits for a processor that computes."""
_LATENCY_BYTES, _N_LATENCIES, _LATENCY_S = 4 * KIB, 24, 0.04
_MEMORY_BYTES = 8 * MIB


class Shape(NamedTuple):
    """`n_parallel` reads of `block_bytes` at any time."""

    block_bytes: int
    n_parallel: int

    @property
    def flying_bytes(self) -> int:
        return self.block_bytes * self.n_parallel


DEFAULT_SHAPE = Shape(1 * MIB, 2)


@dataclass(frozen=True, slots=True)
class ReadPattern:
    """The way to read a device, and what that gave when it was measured.

    `how`: how reads reach the flash, as the store says it. `bytes_per_s`: of `n_parallel` reads of `block_bytes` in
    flight all the time. `latency_s`: of a single read of 4 KiB. `cpu_s_per_gb`: processor time of the readers for
    10^9 bytes.
    """

    block_bytes: int
    n_parallel: int
    how: str
    bytes_per_s: float
    latency_s: float
    cpu_s_per_gb: float

    @property
    def direct(self) -> bool:
        """Whether reads go past the page cache without touching it."""
        return self.how.startswith("direct")


@dataclass(frozen=True, slots=True)
class Turn:
    """What one shape gave, read the way that `how` says."""

    how: str
    block_bytes: int
    n_parallel: int
    bytes_per_s: float
    cpu_s_per_gb: float


Round = dict[Shape, Turn]


@dataclass(frozen=True, slots=True)
class Calibration:
    """The best pattern, and what all shapes that were tried gave, by block size and number of reads."""

    pattern: ReadPattern
    table: tuple[Turn, ...]


@dataclass(frozen=True, slots=True)
class Stretch:
    """The part of a store's file that may be read for measuring: from `start` to its end."""

    file: int
    n_bytes: int
    start: int = 0

    @property
    def tells(self) -> bool:
        """Whether it is long enough to say something about the device."""
        return self.n_bytes >= ENOUGH_BYTES


def calibrate(
    store: Store,
    stretch: Stretch,
    *,
    limit_bytes: int,
    seconds: float = THOROUGH_S,
    shapes: Sequence[Shape] | None = None,
) -> Calibration:
    """Return the best way of reading `stretch`, found within about `seconds` and half of `limit_bytes` of memory.

    Every shape (all that fit, unless `shapes` says which) has short turns in several rounds; those far behind drop
    out. Speeds are compared within a round only, because the flash of a shared machine may be twice as fast a minute
    later. A device so slow that a round does not fit is judged by what was measured. A stretch that tells nothing has
    a single turn, in the default shape. `store` must not look at the bytes: reads overwrite each other's.
    """
    with _Reader(store, stretch, limit_bytes) as reader:
        latency_s = reader.latency_s()
        if stretch.tells:
            rounds, best = _contest(reader, list(shapes or _candidates(reader)), seconds)
        else:
            best = Shape(min(DEFAULT_SHAPE.block_bytes, reader.largest_bytes), DEFAULT_SHAPE.n_parallel)
            rounds = [{best: reader.turn(best, 0.0)}]
    table = _table(rounds, best)
    chosen = next(turn for turn in table if (turn.block_bytes, turn.n_parallel) == best)
    return Calibration(ReadPattern(*best, store.how, chosen.bytes_per_s, latency_s, chosen.cpu_s_per_gb), table)


def _candidates(reader: _Reader) -> list[Shape]:
    shapes = (Shape(*pair) for pair in product(BLOCKS, PARALLEL))
    return [s for s in shapes if s.block_bytes <= reader.largest_bytes and s.flying_bytes <= MAX_FLYING_BYTES]


def _contest(reader: _Reader, shapes: list[Shape], seconds: float) -> tuple[list[Round], Shape]:
    """Return the rounds, and the best shape."""
    rounds: list[Round] = []
    turn_s = max(seconds / _N_ROUNDS / len(shapes), _TURN_S)
    import random  # who knows the pattern already does without

    order = random.Random(len(shapes))  # the same on every run
    # small ones first, so that a slow device has told something before the time is up
    running, until = sorted(shapes, key=lambda shape: shape.flying_bytes), time.perf_counter() + seconds
    while not rounds or time.perf_counter() < until:
        found: Round = {}
        rounds.append(found)
        for shape in running:
            if not found or time.perf_counter() < until:
                found[shape] = reader.turn(shape, turn_s)
        scores = _rivals(_scores(rounds, running))
        behind = (_HOPELESS if len(rounds) < _ENOUGH_ROUNDS else _BEHIND) * max(scores.values())
        running = [shape for shape, score in scores.items() if score >= behind]
        order.shuffle(running)
    return rounds, _best(scores)


def _rivals(scores: dict[Shape, float]) -> dict[Shape, float]:
    """Leave out what is measured for the table only."""
    return {shape: score for shape, score in scores.items() if shape.n_parallel >= _LEAST_PARALLEL} or scores


def _best(scores: dict[Shape, float]) -> Shape:
    """Return the shape with the fewest bytes in flight, then threads, of those that are as good as the fastest."""
    good = [shape for shape, score in scores.items() if score >= (1 - WORTH) * max(scores.values())]
    return min(good, key=lambda shape: (shape.flying_bytes, shape.n_parallel))


def _scores(rounds: Sequence[Round], running: Collection[Shape], shapes: Collection[Shape] = ()) -> dict[Shape, float]:
    """Return how fast each of `shapes` is (of the running ones by default), relative to the running ones in a round."""
    relative: dict[Shape, list[float]] = {}
    for found in rounds:
        usual = median([found[shape].bytes_per_s for shape in running if shape in found] or [inf])
        for shape in shapes or running:
            if shape in found and usual < inf:
                relative.setdefault(shape, []).append(found[shape].bytes_per_s / usual)
    return {shape: median(values) for shape, values in relative.items()}


def _table(rounds: Sequence[Round], best: Shape) -> tuple[Turn, ...]:
    """Return all shapes as if they had had their turns when `best` had."""
    shapes = sorted({shape for found in rounds for shape in found})
    speed = median(found[best].bytes_per_s for found in rounds if best in found)
    steady = [shape for shape in shapes if all(shape in found for found in rounds[:-1])]  # the last may be cut short
    scores = _scores(rounds, steady, shapes)
    turns = {shape: [found[shape] for found in rounds if shape in found] for shape in shapes}
    return tuple(
        Turn(
            turns[shape][0].how,
            *shape,
            speed * score / scores[best],
            median(turn.cpu_s_per_gb for turn in turns[shape]),
        )
        for shape, score in scores.items()
    )


class _Reader:
    """Reads a stretch in order, round and round, into memory that all reads share: nobody looks at the bytes."""

    def __init__(self, store: Store, stretch: Stretch, limit_bytes: int) -> None:
        self._store, self._file = store, stretch.file
        self._start = min(align_up(stretch.start), align_down(max(stretch.start + stretch.n_bytes - 1, 0)))
        self._stop = stretch.start + stretch.n_bytes
        room = max(min(limit_bytes // 2, _MEMORY_BYTES), BLOCKS[0])
        self.largest_bytes = max(min(1 << room.bit_length() - 1, self._stop - self._start), 1)
        self._buffer = Buffer(align_up(self.largest_bytes) * (room // align_up(self.largest_bytes)), huge=True)
        ctypes.memset(self._buffer.address, 0, self._buffer.n_bytes)  # so that no turn pays for new pages
        self._at, self._place, self._lock = self._start, 0, threading.Lock()

    def __enter__(self) -> _Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self._buffer.release()

    def latency_s(self) -> float:
        """Return the usual time of a single small read, after some to wake the device."""
        times: list[float] = []
        block, until = min(_LATENCY_BYTES, self._stop - self._start), time.perf_counter() + _LATENCY_S
        step = max(align_down((self._stop - self._start) // _N_LATENCIES), PAGE)
        while len(times) < 2 or (len(times) < _N_LATENCIES and time.perf_counter() < until):
            offset = self._start + len(times) * step
            began = time.perf_counter()
            self._store.read_into(
                self._file, offset if offset + block <= self._stop else self._start, block, self._buffer.view, 0
            )
            times.append(time.perf_counter() - began)
        return median(times[1:])

    def turn(self, shape: Shape, seconds: float) -> Turn:
        """Keep `shape.n_parallel` reads in flight for `seconds`, at least one block each."""
        done, cpu_s = [0] * shape.n_parallel, [0.0] * shape.n_parallel
        failures: list[BaseException] = []
        began = time.perf_counter()

        def work(i: int) -> None:
            cpu = time.thread_time()
            try:
                while not failures and (not done[i] or time.perf_counter() - began < seconds):
                    offset, place = self._next(shape.block_bytes)
                    self._store.read_into(self._file, offset, shape.block_bytes, self._buffer.view, place)
                    done[i] += shape.block_bytes
            except BaseException as exc:
                failures.append(exc)
            cpu_s[i] = time.thread_time() - cpu

        readers = [threading.Thread(target=work, args=(i,), daemon=True) for i in range(1, shape.n_parallel)]
        for reader in readers:
            reader.start()
        work(0)
        for reader in readers:
            reader.join()
        if failures:
            raise failures[0]
        elapsed = max(time.perf_counter() - began, 1e-9)
        return Turn(self._store.how, *shape, sum(done) / elapsed, sum(cpu_s) / sum(done) * GB)

    def _next(self, block: int) -> tuple[int, int]:
        """Return where to read the next block from, and where to."""
        with self._lock:
            offset = self._at if self._at + block <= self._stop else self._start
            # through all of the memory, as slots are filled in turn: the same place again would stay in a cache
            place = self._place if self._place + align_up(block) <= self._buffer.n_bytes else 0
            self._at, self._place = offset + block, place + align_up(block)
        return offset, place


def median(values: Iterable[float]) -> float:
    """Return the middle one; `statistics` would load fractions and decimals into every process that streams."""
    ordered = sorted(values)
    half = len(ordered) // 2
    return ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2
