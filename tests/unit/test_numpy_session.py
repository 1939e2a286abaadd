"""What is the NumPy backend's own: threads, BLAS, scratch memory. The rest is in the contract."""

from __future__ import annotations

import threading
import tracemalloc

import numpy as np
import pytest

from edgelm.engine.ir import Op
from edgelm.engine.lanes import BlasThreads, Lanes
from edgelm.errors import BackendUnavailable, Cancelled, UnsupportedModel
from edgelm.files.ggml_types import TensorType
from edgelm.testing.recording import Recording
from edgelm_numpy import BACKEND


def test_threads_do_not_change_a_bit() -> None:
    results = []
    for n_threads in (1, 2, 3):
        session = BACKEND.open(n_threads)
        recording = Recording(7, capacity=64, length=64)
        results.append(recording.run(session, [recording.block(width=256, hidden=1024)])[0])
        session.close()
    assert all(np.array_equal(result, results[0]) for result in results)


def test_blas_is_on_one_thread_only_while_a_session_is_open() -> None:
    blas = BlasThreads()
    if not blas.found:
        pytest.skip("NumPy is linked to another BLAS than OpenBLAS")
    before = blas.n
    assert before is not None
    blas.set(2)
    try:
        first, second = BACKEND.open(2), BACKEND.open(1)
        first.close()
        first.close()
        assert blas.n == 1
        second.close()
        assert blas.n == 2
    finally:
        blas.set(before)


def test_no_threads_is_a_mistake() -> None:
    with pytest.raises(BackendUnavailable, match="at least one thread"):
        BACKEND.open(0)


@pytest.mark.parametrize("n_lanes", [1, 3])
def test_every_task_is_done_once_and_lanes_do_not_meet(n_lanes: int) -> None:
    lanes, done, busy = Lanes(n_lanes), [], [threading.Lock() for _ in range(n_lanes)]

    def work(task: int, lane: int) -> None:
        assert busy[lane].acquire(blocking=False)
        done.append(task)
        busy[lane].release()

    lanes.each(200, work)
    lanes.close()
    assert sorted(done) == list(range(200))


def test_an_error_of_any_lane_arrives() -> None:
    lanes, barrier = Lanes(2), threading.Barrier(2)

    def work(task: int, lane: int) -> None:
        barrier.wait(5)
        if lane == 1:
            raise UnsupportedModel("lane 1")

    with pytest.raises(UnsupportedModel, match="lane 1"):
        lanes.each(2, work)
    lanes.close()


def test_abort_stops_between_tasks() -> None:
    lanes, done = Lanes(1), []

    def work(task: int, lane: int) -> None:
        done.append(task)
        lanes.aborted = task == 3

    with pytest.raises(Cancelled):
        lanes.each(100, work)
    assert done == [0, 1, 2, 3]


@pytest.mark.parametrize("kind", [TensorType.F32, TensorType.Q4_K, TensorType.Q6_K])
@pytest.mark.parametrize("n_tokens", [1, 200])
def test_scratch_promise_counts_what_numpy_allocates(kind: TensorType, n_tokens: int) -> None:
    recording = Recording(n_tokens, capacity=512, length=512)
    output = recording.ops.linear(recording.block(width=256, hidden=512), recording.matrix(256, 1000, kind))
    session = BACKEND.open(2)
    program = recording.program(session, [output])
    promised = session.scratch_bytes(*recording.segment([output]))
    tracemalloc.start()
    try:
        program()
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
        session.close()
    masks_bytes = n_tokens * 512 * 14  # the recording makes masks in every call: distances, comparisons, floats
    assert peak_bytes <= promised + masks_bytes + 100_000


def test_a_program_beyond_the_reserve_is_refused() -> None:
    recording = Recording(4)
    output = recording.ops.linear(recording.value(256), recording.matrix(256, 512))
    session = BACKEND.open(1)
    session.reserve(session.scratch_bytes(*recording.segment([output])) - 1)
    with pytest.raises(AssertionError, match="reserved"):
        session.compile(*recording.segment([output]))
    session.close()


@pytest.mark.parametrize("n_tokens", [1, 16, 200, 512])
def test_what_the_longest_view_needs_does_for_every_shorter_one(n_tokens: int) -> None:
    """A lane takes the more rows at once, the shorter the view is."""
    session = BACKEND.open(1)
    needed = []
    for length in (256, 512, 1024, 2048, 4096, 8192):
        recording = Recording(n_tokens, capacity=8192, length=length)
        segment, shape = recording.segment([recording.block(width=64, hidden=64)])
        needed.append(session.scratch_bytes(segment, shape))
    session.close()
    assert needed == sorted(needed)


def test_an_unknown_operation_is_named() -> None:
    recording = Recording(1)
    segment, shape = recording.segment([recording.ops.scale(recording.value(8), 2.0)])
    strange = segment._replace(ops=(Op("convolve", (0,), 1),))
    session = BACKEND.open(1)
    with pytest.raises(UnsupportedModel, match="convolve"):
        session.compile(strange, shape)
    session.close()
