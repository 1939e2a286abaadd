"""Pinned weights: the bytes that are wanted at addresses that never change, and no page more."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgelm.errors import Cancelled
from edgelm.files.errors import TruncatedFile
from edgelm.memory.buffer import HUGE_PAGE, PAGE
from edgelm.memory.meter import Meter
from edgelm.memory.pinned import PinnedWeights
from edgelm.memory.stores import CountingStore, MemoryStore
from edgelm.memory.units import Part

STEP = 3000
SIZES = (40 * STEP + 17, 9 * STEP)
FILES = [np.random.default_rng(i).bytes(size) for i, size in enumerate(SIZES)]


def part(file: int, start: int, n_steps: int) -> Part:
    return Part("m", start, n_steps, file, start * STEP, n_steps * STEP, STEP)


parts = st.lists(
    st.one_of(
        st.builds(part, st.just(0), st.integers(0, 36), st.integers(1, 4)),
        st.builds(part, st.just(1), st.integers(0, 6), st.integers(1, 3)),
    ),
    max_size=8,
)


def holds(pinned: PinnedWeights, wanted: Sequence[Part]) -> bool:
    return all(
        ctypes.string_at(pinned.address(p.file, p.offset), p.n_bytes) == FILES[p.file][p.offset : p.offset + p.n_bytes]
        for p in wanted
    )


def pages(wanted: Sequence[Part]) -> int:
    touched = {(p.file, page) for p in wanted for page in range(p.offset // PAGE, -(-(p.offset + p.n_bytes) // PAGE))}
    return len(touched) * PAGE


@settings(max_examples=80, deadline=None)
@given(st.lists(parts, min_size=1, max_size=5))
def test_every_change_leaves_just_what_is_wanted(changes: list[list[Part]]) -> None:
    pinned = PinnedWeights(SIZES)
    store = CountingStore(MemoryStore(FILES))
    try:
        for wanted in changes:
            pinned.keep(wanted, store)
            assert holds(pinned, wanted)
            assert pages(wanted) <= pinned.memory_bytes <= pages(wanted) + len(wanted) * PAGE  # small gaps are filled
            before = store.snapshot().n_reads
            pinned.keep(wanted, store)
            assert store.snapshot().n_reads == before, "what is held is not read again"
    finally:
        pinned.close()


def test_memory_goes_back_to_the_system_also_from_huge_pages() -> None:
    size = 24 * HUGE_PAGE
    content = np.random.default_rng(2).bytes(size)
    pinned, meter = PinnedWeights([size]), Meter()
    whole = Part("m", 0, size // PAGE, 0, 0, size, PAGE)
    store = MemoryStore([content])
    try:
        pinned.keep([whole], store)
        full = meter.sample().rss_bytes
        # every second megabyte: no huge page survives as a whole
        some = [
            whole._replace(offset=i << 20, n_bytes=1 << 20, rows=(1 << 20) // PAGE) for i in range(0, size >> 20, 2)
        ]
        pinned.keep(some, store)
        half = meter.sample().rss_bytes
        assert full - half > 0.45 * size
        assert all(
            ctypes.string_at(pinned.address(0, p.offset), p.n_bytes) == content[p.offset : p.offset + p.n_bytes]
            for p in some
        )
        pinned.keep([], store)
        assert half - meter.sample().rss_bytes > 0.45 * size
    finally:
        pinned.close()


def test_a_failed_read_is_raised_and_can_be_tried_again() -> None:
    wanted = [part(0, 0, 30)]
    pinned = PinnedWeights(SIZES)
    try:
        with pytest.raises(TruncatedFile):
            pinned.keep(wanted, MemoryStore([FILES[0][:100], b""]))
        pinned.keep(wanted, MemoryStore(FILES))
        assert holds(pinned, wanted)
    finally:
        pinned.close()


def test_loading_can_be_stopped_and_tells_its_progress() -> None:
    told: list[tuple[int, int]] = []
    pinned = PinnedWeights(SIZES)
    try:
        with pytest.raises(Cancelled):
            pinned.keep([part(0, 0, 30)], MemoryStore(FILES), cancelled=lambda: True)
        pinned.keep([part(0, 0, 20), part(1, 2, 3)], MemoryStore(FILES), progress=lambda *at: told.append(at))
        assert [done for done, _ in told] == sorted(done for done, _ in told)
        assert told[-1] == (23 * STEP, 23 * STEP)

        def fail(done: int, total: int) -> None:
            raise RuntimeError("the terminal is gone")

        with pytest.raises(RuntimeError, match="terminal"):
            pinned.keep([part(0, 0, 38)], MemoryStore(FILES), progress=fail)
    finally:
        pinned.close()


def test_closing_twice_is_harmless(tmp_path: Path) -> None:
    pinned = PinnedWeights([10])
    pinned.close()
    pinned.close()
