"""The best way to read a device is found, on fast and slow ones, in the time and the memory that were given."""

from __future__ import annotations

import os
import sys
import threading
import time

import pytest

from edgelm.errors import ModelFileError
from edgelm.memory.flash import ENOUGH_BYTES, MAX_FLYING_BYTES, QUICK_S, Shape, Stretch, calibrate
from edgelm.memory.meter import Meter
from edgelm.memory.stores import CountingStore, MemoryStore, ThrottledStore, open_store
from edgelm.sizes import GB, KIB, MB, MIB
from edgelm.testing.memory import peak_growth_bytes

CONTENT = bytes(16 * MIB)
STRETCH = Stretch(0, len(CONTENT))


class WideStore(MemoryStore):
    """A device that takes as long for a read whatever its size, and serves `width` of them at once."""

    how = "direct (made up)"

    def __init__(self, width: int, seconds: float) -> None:
        super().__init__([CONTENT])
        self._places, self._seconds = threading.Semaphore(width), seconds

    def read_into(self, file: int, offset: int, n_bytes: int, buffer: memoryview, at: int) -> int:
        with self._places:
            time.sleep(self._seconds)
        return at


def find(store, seconds=0.2):
    return calibrate(store, STRETCH, limit_bytes=20 * MB, seconds=seconds).pattern


def test_a_device_that_is_slow_to_begin_is_read_in_large_blocks():
    assert find(ThrottledStore(MemoryStore([CONTENT]), 2 * GB, 0.001)).block_bytes >= 1 * MIB


def test_a_device_that_is_quick_to_begin_is_read_with_little_in_flight():
    pattern = find(ThrottledStore(MemoryStore([CONTENT]), 100 * MB))
    assert pattern.block_bytes * pattern.n_parallel <= MAX_FLYING_BYTES // 2  # a busy machine blurs what is equal
    assert pattern.bytes_per_s == pytest.approx(100 * MB, rel=0.5)


def test_a_device_that_serves_many_gets_many():
    pattern = find(WideStore(8, 0.001))
    assert pattern.block_bytes * pattern.n_parallel >= MAX_FLYING_BYTES // 2
    assert pattern.direct
    assert pattern.latency_s == pytest.approx(0.001, rel=1.0)


def test_one_read_at_a_time_is_measured_and_never_chosen():
    found = calibrate(WideStore(1, 0.001), STRETCH, limit_bytes=20 * MB, seconds=0.3)
    assert found.pattern.n_parallel == 2
    speeds = {(turn.block_bytes, turn.n_parallel): turn.bytes_per_s for turn in found.table}
    assert len(speeds) == len(found.table) == 21
    assert speeds[1 * MIB, 1] > 0.2 * speeds[1 * MIB, 2]
    assert found.pattern.bytes_per_s == speeds[found.pattern.block_bytes, 2]


def test_a_slow_device_is_not_kept_busy_for_long():
    slow = CountingStore(ThrottledStore(MemoryStore([CONTENT]), 20 * MB, 0.002))
    pattern = find(slow, QUICK_S)
    assert pattern.bytes_per_s == pytest.approx(20 * MB, rel=0.5)
    assert slow.snapshot().read_bytes < 12 * MIB


def test_given_shapes_are_the_only_ones():
    store = CountingStore(MemoryStore([CONTENT]))
    found = calibrate(store, STRETCH, limit_bytes=20 * MB, seconds=0.02, shapes=[Shape(256 * KIB, 4)])
    assert (found.pattern.block_bytes, found.pattern.n_parallel) == (256 * KIB, 4)
    assert len(found.table) == 1


@pytest.mark.parametrize("n_bytes", [1, 4096, 100_000, MIB, MIB + 1, 3 * MIB + 5])
@pytest.mark.parametrize("start", [0, 5000])
def test_small_files_are_read_once(n_bytes, start):
    store = CountingStore(MemoryStore([bytes(start + n_bytes)]))
    found = calibrate(store, Stretch(0, n_bytes, start), limit_bytes=20 * MB)
    assert found.pattern.bytes_per_s > 0
    assert len(found.table) == 1
    assert store.snapshot().read_bytes <= 2 * MIB + 32 * 4096
    assert not Stretch(0, n_bytes, start).tells


def test_a_failing_drive_is_no_rate(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes(ENOUGH_BYTES))
    opened, _ = open_store([str(path)])
    os.truncate(path, MIB)
    with pytest.raises(ModelFileError):
        calibrate(opened, Stretch(0, ENOUGH_BYTES), limit_bytes=20 * MB)
    opened.close()


@pytest.mark.skipif(sys.platform != "linux", reason="the peak can be reset on Linux only")
@pytest.mark.parametrize("limit_bytes", [2 * MB, 20 * MB])
def test_calibrating_stays_inside_its_limit(limit_bytes, tmp_path):
    path = tmp_path / "file"
    path.write_bytes(CONTENT)
    opened, _ = open_store([str(path)])
    calibrate(opened, STRETCH, limit_bytes=MB, seconds=0.05)  # threads leave stacks behind
    before = Meter().sample().rss_bytes
    grown = peak_growth_bytes(lambda: calibrate(opened, STRETCH, limit_bytes=limit_bytes, seconds=0.1))
    opened.close()
    assert grown is None or grown <= limit_bytes
    assert Meter().sample().rss_bytes - before < MB
