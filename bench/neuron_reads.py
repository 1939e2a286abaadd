"""What the reads of single feed-forward neurons cost: timed requests, and pages of flash that a text would touch.

Knows which neurons were used, not why. `neurons.py` says so.
"""

from __future__ import annotations

import mmap
import os
import random
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import common
import numpy as np
from numpy.typing import NDArray

from edgelm.files.model import ModelFile

Chosen = NDArray[np.bool_]
"""Which neurons of a layer are used, [tokens, neurons]."""

WINDOWS = (1, 2, 4, 8)
HOT_SHARES = (0.1, 0.25, 0.5)
PAGE, REQUESTS, THREADS = 4096, (4096, 8192, 65536), (1, 2, 4, 8)
SEQUENTIAL = 1 << 20


@dataclass(frozen=True, slots=True)
class Cost:
    """Seconds of a request and of a byte, with as many requests in flight as serve best."""

    request_s: float
    byte_s: float

    def of(self, n_bytes: float, n_requests: float) -> float:
        return n_requests * self.request_s + n_bytes * self.byte_s

    def in_order(self, n_bytes: float) -> float:
        """Return the seconds of large requests, as the exact plan makes them."""
        return self.of(n_bytes, n_bytes / SEQUENTIAL)


def read_rate(path: Path, n_bytes: int, n_threads: int, sequential: bool, seconds: float) -> tuple[float, float]:
    """Return requests a second, past the page cache, and the processor's seconds for each."""
    handle, n_places = os.open(path, os.O_RDONLY | os.O_DIRECT), path.stat().st_size // n_bytes
    done, start, lock = [0] * n_threads, time.perf_counter(), threading.Lock()
    turn = iter(i % n_places for i in range(1 << 40))

    def work(thread: int) -> None:
        buffer, rng = [mmap.mmap(-1, n_bytes)], random.Random()
        while time.perf_counter() - start < seconds:
            for _ in range(1 if sequential else 16):
                with lock:
                    place = next(turn) if sequential else rng.randrange(n_places)
                os.preadv(handle, buffer, place * n_bytes)
                done[thread] += 1

    cpu = time.process_time()
    threads = [threading.Thread(target=work, args=(i,)) for i in range(n_threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    elapsed, cpu = time.perf_counter() - start, time.process_time() - cpu
    os.close(handle)
    return sum(done) / elapsed, cpu / sum(done)


def measure_flash(report: common.Report, model: str, path: Path, rounds: int) -> Cost:
    """Time small random and large sequential reads, in turn."""
    kinds = [(n, threads) for n in (*REQUESTS, SEQUENTIAL) for threads in THREADS]
    found: dict[tuple[int, int], list[tuple[float, float]]] = {kind: [] for kind in kinds}
    for _ in range(rounds):
        for n_bytes, threads in kinds:
            found[n_bytes, threads].append(read_rate(path, n_bytes, threads, n_bytes == SEQUENTIAL, 0.25))
    rates = {kind: common.middle(rate for rate, _ in each) for kind, each in found.items()}
    for (n_bytes, threads), rate in rates.items():
        order = "in order" if n_bytes == SEQUENTIAL else "at random"
        row = {"KiB": n_bytes // 1024, "order": order, "threads": threads, "requests/s": rate}
        row |= {"MB/s": rate * n_bytes / 1e6}
        row |= {"CPU us a request": 1e6 * common.middle(cpu for _, cpu in found[n_bytes, threads])}
        report.add("Direct reads", model=model, **row)
    page_s, large_s = (1 / max(rates[n, threads] for threads in THREADS) for n in (PAGE, SEQUENTIAL))
    byte_s = (large_s - page_s) / (SEQUENTIAL - PAGE)
    return Cost(page_s - PAGE * byte_s, byte_s)


def largest(score: NDArray[np.float32], share: float) -> Chosen:
    n_left_out = score.shape[1] - max(1, round(share * score.shape[1]))
    return np.asarray(score >= np.partition(score, n_left_out, axis=1)[:, n_left_out, None])


@dataclass(frozen=True, slots=True)
class Bundles:
    """A layer's up rows and down columns on flash, neuron by neuron in `order`, `stride` bytes each."""

    order: NDArray[np.int64]
    stride: float

    def read(self, wanted: Chosen, bridge: float) -> tuple[int, int]:
        """Return bytes and requests that fetch the pages of `wanted`; gaps of at most `bridge` bytes are read, too."""
        places = np.flatnonzero(wanted[self.order])
        if not len(places):
            return 0, 0
        first = (places * self.stride).astype(np.int64) // PAGE
        last = ((places + 1) * self.stride - 1).astype(np.int64) // PAGE
        gaps = np.maximum(first[1:] - last[:-1] - 1, 0) * PAGE
        skipped = gaps[gaps > bridge]
        return int((last[-1] + 1 - first[0]) * PAGE - skipped.sum()), 1 + len(skipped)


def recent(chosen: Chosen, window: int) -> Chosen:
    """Return the neurons that any of the `window` tokens before used."""
    union = np.zeros_like(chosen)
    for back in range(1, window + 1):
        union[back:] |= chosen[:-back]
    return union


def caches(chosen: list[Chosen], half: int) -> Iterator[tuple[str, list[Chosen]]]:
    """Yield ways to hold neurons in memory: which are held when a token comes, layer by layer."""
    yield "none", [np.zeros_like(layer) for layer in chosen]
    for window in WINDOWS:
        yield f"used by the last {window}", [recent(layer, window) for layer in chosen]
    for share in HOT_SHARES:
        hot = [largest(layer[:half].mean(axis=0, dtype=np.float32)[None], share) for layer in chosen]
        yield f"hottest {share:.0%}", [np.repeat(h, len(layer), 0) for h, layer in zip(hot, chosen, strict=True)]


@dataclass(frozen=True, slots=True)
class Way:
    """A layout and a cache: what a token reads of up and down on average, and the memory the cache takes at most."""

    layout: str
    cache: str
    seconds: float
    cache_bytes: float


@dataclass(frozen=True, slots=True)
class Replay:
    """The neurons that the text used, layer by layer: its first half tells which are hot, its second is replayed."""

    chosen: list[Chosen]
    strides: list[float]
    cost: Cost

    @property
    def half(self) -> int:
        return len(self.chosen[0]) // 2

    def ways(self, report: common.Report, **names: str) -> list[Way]:
        """Price every cache and layout."""
        hottest = [np.argsort(-layer[: self.half].mean(axis=0), kind="stable") for layer in self.chosen]
        layouts = {"as in the file": [np.arange(len(order)) for order in hottest], "hottest first": hottest}
        used, ways = self._mean_bytes([layer[self.half :] for layer in self.chosen]), []
        for cache, held in caches(self.chosen, self.half):
            misses = [(layer & ~h)[self.half :] for layer, h in zip(self.chosen, held, strict=True)]
            sizes = np.sum([h[self.half :].sum(axis=1) * s for h, s in zip(held, self.strides, strict=True)], axis=0)
            cache_bytes, missed = float(sizes.max()), self._mean_bytes(misses)
            for layout, orders in layouts.items():
                pages, _, page_requests = self._read(orders, misses, 0.0)
                least, seconds, requests = self._read(orders, misses, self.cost.request_s / self.cost.byte_s)
                ways.append(Way(layout, cache, seconds, cache_bytes))
                row = {
                    "used MB": common.mb(used), "hit %": 100 * (1 - missed / used), "cache MB": common.mb(cache_bytes),
                    "missed MB": common.mb(missed), "their pages MB": common.mb(pages), "in requests": page_requests,
                    "amplification": pages / missed if missed else None,
                    "with gaps MB": common.mb(least), "with gaps, requests": requests, "ms": 1e3 * seconds,
                }  # fmt: skip
                report.add("Up and down, for each token", **names, layout=layout, cache=cache, **row)
        return ways

    def _mean_bytes(self, neurons: list[Chosen]) -> float:
        return float(sum(n.sum() * stride for n, stride in zip(neurons, self.strides, strict=True)) / len(neurons[0]))

    def _read(self, orders: list[NDArray[np.int64]], misses: list[Chosen], bridge: float) -> tuple[float, float, float]:
        """Return bytes, seconds and requests of a token."""
        bundles = [Bundles(order, stride) for order, stride in zip(orders, self.strides, strict=True)]
        each = [b.read(token, bridge) for b, layer in zip(bundles, misses, strict=True) for token in layer]
        n_bytes, n_requests = np.sum(each, axis=0) / len(misses[0])
        return float(n_bytes), float(self.cost.of(n_bytes, n_requests)), float(n_requests)


def strides(file: ModelFile) -> list[float]:
    """Return the bytes of a neuron's up row and down column, for each layer."""
    ups = [info for name, info in file.tensors.items() if name.endswith(".ffn_up.weight")]
    return [(up.n_bytes + file.tensors[up.name.replace("_up", "_down")].n_bytes) / up.n_rows for up in ups]
