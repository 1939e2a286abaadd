"""Times and events: sums always, events only while recorded, bounded, reads that overlap summed once."""

from __future__ import annotations

import pytest

from edgelm.errors import ConfigError
from edgelm.memory import timeline as module
from edgelm.memory.timeline import Timeline, Times


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Return a list whose only item is the time."""
    now = [100.0]
    monkeypatch.setattr(module.time, "perf_counter", lambda: now[0])
    return now


def test_sums_without_a_recording(clock):
    times = Times()
    clock[0] = 103.0
    times.add("compute", 0, 101.0)
    times.add("compute", 1, 102.5)
    times.add("sample", 1, 102.75)
    assert times.sums_s() == {"read": 0.0, "wait": 0.0, "compute": 2.5, "sample": 0.25, "token": 0.0}


def test_reads_that_overlap_are_summed_once(clock):
    times = Times()
    first = times.begin_read()
    clock[0] = 101.0
    second = times.begin_read()
    clock[0] = 102.0
    times.end_read(0, first, 10)
    assert times.sums_s()["read"] == 2.0  # one is still under way
    clock[0] = 104.0
    times.end_read(1, second, 10)
    clock[0] = 110.0
    assert times.sums_s()["read"] == 4.0


def test_events_count_from_the_start_of_the_recording(clock):
    times = Times()
    times.add("compute", 9, 99.0)  # before: not in it
    with times.recording() as timeline:
        clock[0] = 102.0
        times.add("wait", 3, 101.0, 7)
        times.end_read(4, times.begin_read(), 4096)
    times.add("compute", 9, 101.0)  # after: not in it
    assert [(e.kind, e.index, e.begin_s, e.end_s, e.n_bytes) for e in timeline.events()] == [
        ("wait", 3, 1.0, 2.0, 7), ("read", 4, 2.0, 2.0, 4096),
    ]  # fmt: skip


def test_a_timeline_is_bounded_and_says_what_it_lost():
    timeline = Timeline(capacity=3)
    for i in range(5):
        timeline.add("compute", i, 0.0, 0.0, 0)
    assert [event.index for event in timeline.events()] == [0, 1, 2]
    assert timeline.dropped == 2


def test_one_recording_at_a_time():
    times = Times()
    with times.recording(), pytest.raises(ConfigError, match="recorded already"), times.recording():
        pass
    with times.recording():  # the first one has ended
        pass
