"""From events to tokens: four parts that add up, reads that overlap counted once, lanes without overlaps."""

from __future__ import annotations

import pytest

from edgelm_apps.profiling.split import Event, Token, excerpt, lanes, mean, tokens
from edgelm_apps.profiling.sweep import thinned


def event(kind: str, begin_s: float, end_s: float, n_bytes: int = 0, index: int = 0) -> Event:
    return Event(kind, index, begin_s, end_s, n_bytes)


EVENTS = (
    event("token", 1.0, 1.0),
    event("read", 0.5, 1.5, 10),
    event("read", 1.2, 1.8, 20),
    event("wait", 1.0, 1.5),
    event("compute", 1.5, 1.75),
    event("read", 1.9, 2.5, 40),
    event("sample", 1.75, 1.875),
    event("token", 2.0, 2.0),
    event("compute", 2.0, 3.0),
    event("token", 3.0, 3.0),
)


def test_a_token_is_split_into_parts_that_add_up() -> None:
    first, second = tokens(EVENTS)
    assert first == Token(0.5, 0.25, 0.125, 0.125, pytest.approx(0.9), 30)  # type: ignore[arg-type]
    assert first.total_s == 1.0
    assert second == Token(0.0, 1.0, 0.0, 0.0, 0.5, 40)


def test_the_average_token() -> None:
    average = mean(tokens(EVENTS))
    assert (average.wait_s, average.compute_s, average.read_bytes) == (0.25, 0.625, 35)
    assert mean(()).total_s == 0


def test_one_token_alone_has_no_time_of_its_own() -> None:
    assert tokens(EVENTS[:1]) == ()
    assert excerpt(EVENTS[:1], 3) == ()


def test_an_excerpt_begins_at_nought_and_is_cut_to_its_tokens() -> None:
    cut = excerpt(EVENTS, 1)
    assert min(one.begin_s for one in cut) == 0
    assert max(one.end_s for one in cut) == 1.0
    assert [one.n_bytes for one in cut if one.kind == "read"] == [10, 20, 40]
    assert len(excerpt(EVENTS, 9)) == len(EVENTS)


def test_reads_of_one_lane_never_overlap() -> None:
    placed = lanes(one for one in EVENTS if one.kind == "read")
    assert [(lane, read.n_bytes) for lane, read in placed] == [(0, 10), (1, 20), (0, 40)]


def test_thinning_keeps_the_peak() -> None:
    samples = [(float(i), i % 97) for i in range(1000)]
    kept = thinned(samples, 30)
    assert len(kept) <= 30
    assert max(rss for _, rss in kept) == 96
    assert thinned(samples[:5], 30) == tuple(samples[:5])
