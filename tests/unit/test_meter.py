"""The meter sees memory come and go, and keeps the peak."""

from __future__ import annotations

import ctypes
import sys
import time

import pytest

from edgelm.memory.buffer import Buffer
from edgelm.memory.meter import MemoryUsage, Meter

SIZE = 24 << 20


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="exact counters of Linux")
@pytest.mark.parametrize("huge", [False, True])
def test_it_sees_a_buffer_come_and_go_and_keeps_the_peak(huge: bool) -> None:
    meter = Meter()
    before = meter.sample()
    with Buffer(SIZE + 5000, huge=huge) as buffer:
        assert meter.sample().rss_bytes - before.rss_bytes < 1 << 20, "untouched memory costs nothing"
        ctypes.memset(buffer.address, 1, buffer.n_bytes)  # no temporary, which the allocator might keep
        held = meter.sample()
        assert SIZE <= held.anon_bytes - before.anon_bytes < SIZE + (1 << 20)
        buffer.discard(0, SIZE // 2)
        half = meter.sample()
        assert SIZE // 2 - (1 << 20) < half.anon_bytes - before.anon_bytes < SIZE // 2 + (1 << 20)
    after = meter.sample()
    assert after.rss_bytes - before.rss_bytes < 1 << 20
    assert after.peak_bytes >= held.rss_bytes
    assert after.anon_bytes + after.file_bytes == after.rss_bytes


def test_a_sample_is_cheap() -> None:
    meter = Meter()
    best = min(_timed(meter) for _ in range(20))
    assert best < 200e-6  # about 20 microseconds on an idle desktop; shared machines are slower


def _timed(meter: Meter) -> float:
    begin = time.perf_counter()
    for _ in range(20):
        meter.sample()
    return (time.perf_counter() - begin) / 20


class Scripted:
    """A platform that answers what it is told, one sample after the other."""

    def __init__(self, *samples: tuple[int, int, int, int]) -> None:
        self._samples = iter(samples)

    def memory_counters(self) -> tuple[int, int, int, int]:
        return next(self._samples)


def test_the_peak_is_never_below_a_sample_that_was_seen() -> None:
    meter = Meter(Scripted((40, 30, 30, 10), (20, 35, 15, 5), (20, 50, 15, 5)))  # type: ignore[arg-type]
    assert meter.start == MemoryUsage(rss_bytes=40, peak_bytes=40, anon_bytes=30, file_bytes=10)
    assert [meter.sample().peak_bytes for _ in range(2)] == [40, 50]
