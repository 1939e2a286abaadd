"""Memory that is put into huge pages keeps its content, and only what is new and full is touched."""

from __future__ import annotations

import mmap
import sys

import pytest

from edgelm_onnx.huge_pages import HUGE_BYTES, Region, _without, collapse_since, regions

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux collapses pages afterwards")
N_BYTES = 8 * HUGE_BYTES


def huge_bytes() -> int:
    with open("/proc/self/smaps_rollup", encoding="ascii") as lines:
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("AnonHugePages"))


def test_new_full_memory_is_collapsed_and_keeps_its_content() -> None:
    before, huge_before = regions(), huge_bytes()
    assert before
    with mmap.mmap(-1, N_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        memory.write(bytes(range(256)) * (N_BYTES // 256))
        done = collapse_since(before)
        if not done:
            pytest.skip("this kernel does not collapse pages, or has no huge ones free")
        assert done % HUGE_BYTES == 0
        assert huge_bytes() - huge_before >= min(done, N_BYTES - HUGE_BYTES) // 2
        assert memory[:] == bytes(range(256)) * (N_BYTES // 256)


def test_sparse_and_known_memory_is_left_alone() -> None:
    with mmap.mmap(-1, N_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as known:
        known.write(b"x" * N_BYTES)
        before = regions()
        with mmap.mmap(-1, N_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as sparse:
            sparse[0] = 1
            assert collapse_since(before) == 0
    assert collapse_since(()) == 0


def test_parts_that_are_new() -> None:
    others = (Region(0, 10, 0), Region(20, 30, 0), Region(40, 50, 0))
    assert _without(Region(5, 45, 0), others) == [(10, 20), (30, 40)]
    assert _without(Region(20, 30, 0), others) == []
    assert _without(Region(60, 70, 0), others) == [(60, 70)]
