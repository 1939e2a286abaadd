"""What the flash of this device gives: block size, reads in flight, threads against io_uring, idle and beside compute.

Every combination has its short turn in every round, in an order of its own, so that a flash that is faster in one
minute than in the next favours none. Reads are direct and in file order, as the window's are. CPU time is that of the
process without its computing thread; "compute" is how fast that thread gets on, relative to a round without reads.
"""

from __future__ import annotations

import ctypes
import os
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import common
import uring

from edgelm.memory.buffer import Buffer

SCRATCH_BYTES = 768 << 20
SCRATCH_PIECE_BYTES = 4 << 20
BLOCKS_KIB = (64, 128, 256, 512, 1024, 2048, 4096)
CYCLE_BYTES = 8 << 20
"""Memory that blocks land in by turns, as in a window's slots, and more than the cache of a core holds."""
LATENCY_BYTES, N_LATENCIES = 4096, 200
MATRIX_BYTES = 64 << 20
BUFFERS = {
    "huge pages": (True, 0),
    "huge pages, 4 KiB off": (True, 4096),
    "small pages": (False, 0),
    "small pages, 512 bytes off": (False, 512),
}


@dataclass(frozen=True, slots=True)
class Memory:
    address: int
    view: memoryview


@dataclass(slots=True)
class File:
    """The file that is read, in order and round and round."""

    path: Path
    handle: int = field(init=False)
    n_bytes: int = field(init=False)
    _at: int = 0
    _n_read: int = 0

    def __post_init__(self) -> None:
        self.handle, self.n_bytes = os.open(self.path, os.O_RDONLY | os.O_DIRECT), os.path.getsize(self.path)

    def next(self, block: int, room: int) -> tuple[int, int]:
        """Return the offset of the next block, and its place in `room` bytes. Called under a lock, or in one thread."""
        start = self._at if self._at + block <= self.n_bytes else 0
        self._at, self._n_read = start + block, self._n_read + 1
        return start, self._n_read % (room // block) * block


@contextmanager
def memory_of(n_bytes: int, huge: bool, shift: int = 0) -> Iterator[Memory]:
    """Give memory whose pages are there already, `shift` bytes off their beginning."""
    with Buffer(n_bytes + shift, huge=huge) as buffer:
        ctypes.memset(buffer.address, 1, buffer.n_bytes)
        memory = Memory(buffer.address + shift, buffer.view[shift:])
        yield memory
        memory.view.release()


Cell = Callable[[File, Memory, int, int, float], tuple[int, float]]


def by_threads(file: File, memory: Memory, block: int, depth: int, seconds: float) -> tuple[int, float]:
    """Read with `depth` threads for `seconds`; return bytes and the time that they took."""
    room, lock, done = max(CYCLE_BYTES, block * depth), threading.Lock(), [0] * depth
    began = time.perf_counter()

    def work(i: int) -> None:
        while time.perf_counter() - began < seconds:
            with lock:
                offset, at = file.next(block, room)
            done[i] += os.preadv(file.handle, [memory.view[at : at + block]], offset)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(1, depth)]
    for thread in threads:
        thread.start()
    work(0)
    for thread in threads:
        thread.join()
    return sum(done), time.perf_counter() - began


def by_uring(file: File, memory: Memory, block: int, depth: int, seconds: float) -> tuple[int, float]:
    """Read with one thread and `depth` requests in its ring."""
    room, done, flying = max(CYCLE_BYTES, block * depth), 0, 0
    ring = uring.Ring(depth)
    began = time.perf_counter()
    n_new = depth
    while n_new or flying:
        for _ in range(n_new):
            offset, at = file.next(block, room)
            ring.read(file.handle, memory.address + at, block, offset, 0)
        finished = ring.wait()
        flying += n_new - len(finished)
        done += sum(n_bytes for _, n_bytes in finished)
        n_new = len(finished) if time.perf_counter() - began < seconds else 0
    elapsed = time.perf_counter() - began
    ring.close()
    return done, elapsed


WAYS: dict[str, Cell] = {"threads": by_threads, "io_uring": by_uring}


class Compute:
    """A thread that multiplies matrices by vectors on one core, as a decoding model does; never at rest."""

    def __init__(self) -> None:
        import numpy as np

        self.n_products, self._stopped = 0, False
        self._matrix = np.ones((MATRIX_BYTES // 4 // 4096, 4096), np.float32)
        self._vector = np.ones(4096, np.float32)
        self._thread = threading.Thread(target=self._work)
        self._thread.start()
        self._clock = time.pthread_getcpuclockid(self._thread.ident or 0)

    def cpu_s(self) -> float:
        return time.clock_gettime(self._clock)

    def stop(self) -> None:
        self._stopped = True
        self._thread.join()

    def _work(self) -> None:
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})  # of this thread
        while not self._stopped:
            for i in range(0, len(self._matrix), 256):  # 4 MiB at once, so that the count is fine enough
                self._matrix[i : i + 256].dot(self._vector)  # not `@`, which keeps the interpreter's lock
                self.n_products += 1


@contextmanager
def computing(busy: bool) -> Iterator[Compute | None]:
    compute = Compute() if busy else None
    try:
        yield compute
    finally:
        if compute is not None:
            compute.stop()


Turn = tuple[float, float, float]


def turn(compute: Compute | None, cell: Cell, *reads: Any) -> Turn:
    """Return (bytes a second, CPU seconds a GB, products a second) of one turn."""
    cpu, theirs = time.process_time(), compute.cpu_s() if compute else 0.0
    products = compute.n_products if compute else 0
    n_bytes, elapsed = cell(*reads)
    theirs = compute.cpu_s() - theirs if compute else 0.0
    products = compute.n_products - products if compute else 0
    return n_bytes / elapsed, (time.process_time() - cpu - theirs) / n_bytes * 1e9, products / elapsed


def patterns(report: common.Report, file: File, args: Any) -> None:
    """Compare block sizes, depths and ways, with and without a computing thread."""
    ways = [name for name in WAYS if name in args.ways]
    cells = list(product(ways, args.blocks, args.threads))
    turns: dict[tuple[Any, ...], list[Any]] = {}
    alone: list[float] = []
    largest = max(max(args.blocks) * max(args.threads) << 10, CYCLE_BYTES)
    with memory_of(largest, huge=True) as memory:
        for _, busy in product(range(args.rounds), (False, True)):
            random.shuffle(cells)
            with computing(busy) as compute:
                if compute:
                    start, began = compute.n_products, time.perf_counter()
                    time.sleep(4 * args.seconds)
                    alone.append((compute.n_products - start) / (time.perf_counter() - began))
                for way, block, depth in cells:
                    found = turn(compute, WAYS[way], file, memory, block << 10, depth, args.seconds)
                    turns.setdefault((busy, way, block, depth), []).append(found)
    for busy, way, block, depth in product((False, True), ways, args.blocks, args.threads):
        speeds, costs, products = zip(*turns[busy, way, block, depth], strict=True)
        row = {"way": way, "block_kib": block, "in_flight": depth, "mb_per_s": common.mb(common.middle(speeds))}
        row |= {"cpu_s_per_gb": round(common.middle(costs), 4)}
        if busy:
            row["compute"] = round(common.middle(products) / common.middle(alone), 3)
        report.add("beside a computing thread" if busy else "idle", **row)


def buffers(report: common.Report, file: File, args: Any) -> None:
    """Compare what the reads land in."""
    found: dict[str, list[Any]] = {name: [] for name in BUFFERS}
    block, depth = 1 << 20, 2
    for _ in range(args.rounds):
        for name, (huge, shift) in BUFFERS.items():
            with memory_of(CYCLE_BYTES, huge, shift) as memory:
                found[name].append(turn(None, by_threads, file, memory, block, depth, args.seconds))
    for name, turns in found.items():
        speeds, costs, _ = zip(*turns, strict=True)
        report.add(
            f"target of {block >> 10} KiB reads, {depth} threads",
            target=name,
            mb_per_s=common.mb(common.middle(speeds)),
            cpu_s_per_gb=round(common.middle(costs), 4),
        )


def latency(report: common.Report, file: File) -> None:
    """Time single small reads at random places."""
    times = []
    with Buffer(LATENCY_BYTES) as memory:
        for _ in range(N_LATENCIES):
            offset = random.randrange(file.n_bytes // LATENCY_BYTES) * LATENCY_BYTES
            began = time.perf_counter()
            os.preadv(file.handle, [memory.view], offset)
            times.append(time.perf_counter() - began)
    times.sort()
    report.add(
        "latency of a 4 KiB read",
        median_us=round(times[len(times) // 2] * 1e6, 1),
        p95_us=round(times[len(times) * 95 // 100] * 1e6, 1),
    )


def scratch() -> Path:
    """Return a file of random bytes that is on flash; made once."""
    path = common.scratch_folder() / "flash.bin"
    if not path.exists() or path.stat().st_size != SCRATCH_BYTES:
        with path.open("wb") as file:
            for _ in range(SCRATCH_BYTES // SCRATCH_PIECE_BYTES):
                file.write(os.urandom(SCRATCH_PIECE_BYTES))
            os.fsync(file.fileno())
    return path


def main() -> None:
    # one thread of BLAS is the computing thread; the variable is read when NumPy is loaded
    os.environ.update(OPENBLAS_NUM_THREADS="1", OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")
    parser = common.argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--file", type=Path, help="default: a file of random bytes in the cache folder")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2, 4, 8], help="reads in flight")
    parser.add_argument("--blocks", type=int, nargs="+", default=list(BLOCKS_KIB), help="KiB")
    parser.add_argument("--ways", nargs="+", choices=tuple(WAYS), default=list(WAYS))
    parser.add_argument("--rounds", type=int, default=7, help="turns of each combination")
    parser.add_argument("--seconds", type=float, default=0.06, help="of a turn")
    args = parser.parse_args()
    file = File(args.file or scratch())
    report = common.Report("flash", {"file_bytes": file.n_bytes, "rounds": args.rounds, "turn_s": args.seconds})
    if "io_uring" in args.ways:
        try:
            uring.Ring(1).close()
        except OSError as exc:
            args.ways.remove("io_uring")
            print(f"io_uring is refused here ({exc.strerror}): threads only", file=sys.stderr)
    latency(report, file)
    buffers(report, file, args)
    patterns(report, file, args)
    report.finish()


if __name__ == "__main__":
    main()
