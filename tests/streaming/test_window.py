"""The window: the right bytes at the right time, whatever a pass skips, breaks off or fails at."""

from __future__ import annotations

import ctypes
import os
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from edgelm.errors import ModelFileError
from edgelm.files.errors import TruncatedFile
from edgelm.files.ggml_types import TensorType
from edgelm.files.model import TensorInfo
from edgelm.memory import plan as planning
from edgelm.memory.buffer import PAGE
from edgelm.memory.plan import Demand, Plan, make_plan
from edgelm.memory.stores import CountingStore, MemoryStore, Store, ThrottledStore, open_store
from edgelm.memory.window import Window

WIDTH = 256  # floats: a row is a kilobyte
N_MATRICES, N_ROWS = 12, 128
DEMAND = Demand(0, 0, 0, 1, 0, 0, 0)
PATIENCE_S = 20.0
BLOCK_BYTES = 48_000  # less than most units


def tensors() -> list[TensorInfo]:
    n_bytes = N_ROWS * WIDTH * 4
    return [
        TensorInfo(f"m{i}", TensorType.F32, (WIDTH, N_ROWS), 0, NORM.n_bytes + i * (n_bytes + 96), n_bytes)
        for i in range(N_MATRICES)
    ]


NORM = TensorInfo("norm", TensorType.F32, (WIDTH,), 0, 0, WIDTH * 4)
CONTENT = np.random.default_rng(3).bytes(NORM.n_bytes + N_MATRICES * (N_ROWS * WIDTH * 4 + 96))


@pytest.fixture(autouse=True)
def _small_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "MIN_SLOT_BYTES", PAGE)


def plan_with(share: float) -> Plan:
    """Return a plan with room for this share of the weights."""
    return make_plan(tensors(), [DEMAND], int(share * N_MATRICES * N_ROWS * WIDTH * 4), 64)


@contextmanager
def window_of(plan: Plan, store: Store | None = None, n_readers: int = 2) -> Iterator[Window]:
    window = Window(store or MemoryStore([CONTENT]), plan, n_readers=n_readers, block_bytes=BLOCK_BYTES)
    try:
        window.start()
        yield window
    finally:
        within(window.close)


def within(call: object, *args: object) -> None:
    """Call in a thread of its own, and fail rather than hang."""
    errors: list[BaseException] = []

    def work() -> None:
        try:
            call(*args)  # type: ignore[operator]
        except BaseException as exc:
            errors.append(exc)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(PATIENCE_S)
    assert not thread.is_alive(), f"{call} hangs"
    if errors:
        raise errors[0]


def check(window: Window, run: int) -> None:
    """Hold a streamed run, compare every byte of its parts with the file, and release it."""
    if window.runs[run].pinned:
        return
    address = window.hold(run)
    unit = window.runs[run].unit
    for part in unit.parts:
        held = ctypes.string_at(address + unit.offset_of(part), part.n_bytes)
        assert held == CONTENT[part.offset : part.offset + part.n_bytes], part
    window.release(run)


def walk(window: Window, order: Sequence[int] | None = None) -> None:
    """One pass over all runs, or some."""
    order = range(len(window.runs)) if order is None else order
    window.begin([run for run in order if not window.runs[run].pinned])
    for run in order:
        check(window, run)


@pytest.mark.parametrize("share", [0.05, 0.2, 0.5, 0.8, 2.0])
@pytest.mark.parametrize("n_readers", [1, 2, 4])
def test_every_run_holds_its_bytes_in_every_pass(share: float, n_readers: int) -> None:
    plan = plan_with(share)
    with window_of(plan, n_readers=n_readers) as window:
        assert window.memory_bytes == max(plan.slots_bytes, 1)
        for _ in range(4):
            within(walk, window)


def test_bytes_from_flash_are_what_the_plan_says() -> None:
    plan = plan_with(0.4)
    store = CountingStore(MemoryStore([CONTENT]))
    with window_of(plan, store) as window:
        within(walk, window)
        settle(window)
        before, counted = store.snapshot(), window.bytes_streamed
        for _ in range(5):
            within(walk, window)
        settle(window)
        counts = store.snapshot() - before
        assert window.bytes_streamed - counted == 5 * plan.streamed_bytes
    # two blocks of a unit may share a page
    assert 0 <= counts.read_bytes - 5 * plan.streamed_bytes <= counts.n_reads * PAGE


def settle(window: Window) -> None:
    """Wait until the readers have filled every free slot."""
    deadline = time.monotonic() + PATIENCE_S
    while window._free or not all(ahead.done for ahead in window._ahead):
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_reads_go_on_round_the_end_of_a_pass() -> None:
    plan = plan_with(0.3)
    with window_of(plan) as window:
        within(walk, window)
        settle(window)
        assert [ahead.run for ahead in window._ahead] == list(window.cycle[: plan.n_slots])
        waited = window.times.sums_s()["wait"]
        window.begin(window.cycle)
        for run in window.cycle[: plan.n_slots]:
            check(window, run)
        assert window.times.sums_s()["wait"] == waited


def test_passes_that_skip_the_head_and_passes_that_do_not() -> None:
    """Prompt passes hold fewer runs than there are slots, so one run is read ahead for two passes."""
    plan = plan_with(0.6)
    with window_of(plan) as window:
        assert plan.n_slots == 4
        for n in (1, 2, 3, 5):
            head = window.cycle[n] if n < len(window.cycle) else len(window.runs)
            short = range(head)
            for order in (short, short, None, short, None, None):
                within(walk, window, order)
                settle(window)
        assert len(window._free) + len(window._ahead) == plan.n_slots


def test_a_pass_over_pinned_runs_alone_keeps_what_was_read_ahead() -> None:
    plan = plan_with(0.6)
    store = CountingStore(MemoryStore([CONTENT]))
    with window_of(plan, store) as window:
        settle(window)
        before = store.snapshot().n_reads
        pinned = [i for i, run in enumerate(window.runs) if run.pinned][:1]
        for _ in range(3):
            within(walk, window, pinned)
        settle(window)
        assert store.snapshot().n_reads == before
        within(walk, window)


@pytest.mark.parametrize("held", [0, 1, 2])
@pytest.mark.parametrize("n_done", [0, 1, 3, 6])
def test_a_broken_off_pass_leaves_the_next_one_whole(held: int, n_done: int) -> None:
    plan = plan_with(0.3)
    with window_of(plan) as window:
        for _ in range(3):
            window.begin(window.cycle)
            for run in window.cycle[:n_done]:
                check(window, run)
            for run in window.cycle[n_done : n_done + held]:
                window.hold(run)
            window.reset()
            within(walk, window)
        settle(window)
        assert len(window._ahead) == plan.n_slots


class FailingStore(MemoryStore):
    """Fails at every read while `failing` is on."""

    failing = False

    def read_into(self, file: int, offset: int, n_bytes: int, buffer: memoryview, at: int) -> int:
        if self.failing:
            raise TruncatedFile("file", "it is gone", "build it again")
        return super().read_into(file, offset, n_bytes, buffer, at)


def test_an_error_of_a_reader_comes_out_of_hold_and_of_begin() -> None:
    store = FailingStore([CONTENT])
    with window_of(plan_with(0.3), store) as window:
        settle(window)
        store.failing = True
        with pytest.raises(TruncatedFile):
            within(walk, window)
        window.reset()
        for _ in range(2):  # once is not forgotten, and nothing waits for a reader that is gone
            with pytest.raises(TruncatedFile):
                within(walk, window)
            window.reset()


def test_a_failed_read_that_is_dropped_does_not_hang() -> None:
    store = FailingStore([CONTENT])
    with window_of(plan_with(0.3), store) as window:
        settle(window)
        window.begin(window.cycle)
        store.failing = True
        check(window, window.cycle[0])  # its slot goes to a read that fails
        deadline = time.monotonic() + PATIENCE_S
        while window._failed is None:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        with pytest.raises(TruncatedFile):
            within(window.begin, window.cycle[2:])


def test_a_file_truncated_while_it_streams_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(CONTENT)
    store, _ = open_store([str(path)])
    try:
        with window_of(plan_with(0.3), store) as window:
            within(walk, window)
            os.truncate(path, len(CONTENT) // 8)
            with pytest.raises(ModelFileError, match="changed"):
                within(walk, window, [*window.cycle, *window.cycle])
    finally:
        store.close()


@pytest.mark.parametrize("moment", ["before", "loaded", "begun", "held", "twice"])
def test_close_never_hangs(moment: str) -> None:
    store = ThrottledStore(MemoryStore([CONTENT]), 50e6)
    window = Window(store, plan_with(0.3))
    if moment != "before":
        window.start()
    if moment in ("begun", "held"):
        window.begin(window.cycle)
    if moment == "held":
        window.hold(window.cycle[0])
    within(window.close)
    if moment == "twice":
        within(window.close)
    assert not [thread for thread in window._readers if thread.is_alive()]


def test_reads_overlap_with_computing() -> None:
    """A pass that computes as long as it reads takes much less than both after each other."""
    plan = plan_with(0.25)
    bytes_per_s = 20e6
    read_s = plan.streamed_bytes / bytes_per_s
    with window_of(plan, ThrottledStore(MemoryStore([CONTENT]), bytes_per_s)) as window:

        def timed(compute_s: float) -> float:
            settle(window)
            began = time.perf_counter()
            for _ in range(2):
                window.begin(window.cycle)
                for run in window.cycle:
                    window.hold(run)
                    time.sleep(compute_s / len(window.cycle))
                    window.release(run)
            return (time.perf_counter() - began) / 2

        alone, both = timed(0.0), timed(read_s)
    assert alone > 0.6 * read_s  # what was read ahead comes for nothing
    assert both < 0.75 * (alone + read_s)
