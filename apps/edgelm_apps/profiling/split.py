"""From recorded events to what people ask: where the time of each token went, which lane a read was in. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise


@dataclass(frozen=True, slots=True)
class Event:
    """An event of `edgelm.Timeline`, as it comes out of JSON."""

    kind: str
    index: int
    begin_s: float
    end_s: float
    n_bytes: int


@dataclass(frozen=True, slots=True)
class Token:
    """One token's time, from the one before it: four parts that add up, and beside them when flash was busy."""

    wait_s: float
    compute_s: float
    sample_s: float
    other_s: float
    read_s: float
    read_bytes: int

    @property
    def total_s(self) -> float:
        return self.wait_s + self.compute_s + self.sample_s + self.other_s


def tokens(events: Sequence[Event]) -> tuple[Token, ...]:
    """Split every token but the first, whose time is the prompt's."""
    marks = [event.end_s for event in events if event.kind == "token"]
    return tuple(_token(events, begin_s, end_s) for begin_s, end_s in pairwise(marks))


def mean(split: Sequence[Token]) -> Token:
    """Return the average token; all zero if there is none."""
    n = max(len(split), 1)
    return Token(
        wait_s=sum(token.wait_s for token in split) / n,
        compute_s=sum(token.compute_s for token in split) / n,
        sample_s=sum(token.sample_s for token in split) / n,
        other_s=sum(token.other_s for token in split) / n,
        read_s=sum(token.read_s for token in split) / n,
        read_bytes=sum(token.read_bytes for token in split) // n,
    )


def excerpt(events: Sequence[Event], n_tokens: int) -> tuple[Event, ...]:
    """Return what happened during `n_tokens` tokens from the middle of the answer, times from its beginning."""
    marks = [event.end_s for event in events if event.kind == "token"]
    if len(marks) < 2:
        return ()
    first = max((len(marks) - 1 - n_tokens) // 2, 0)
    begin_s, end_s = marks[first], marks[min(first + n_tokens, len(marks) - 1)]
    return tuple(
        replace(event, begin_s=max(event.begin_s, begin_s) - begin_s, end_s=min(event.end_s, end_s) - begin_s)
        for event in events
        if event.begin_s <= end_s and event.end_s >= begin_s
    )


def lanes(reads: Iterable[Event]) -> list[tuple[int, Event]]:
    """Give each read the first lane that is free when it begins: as many lanes as were ever read at once."""
    busy_until: list[float] = []
    placed = []
    for read in sorted(reads, key=lambda event: event.begin_s):
        lane = next((i for i, until in enumerate(busy_until) if until <= read.begin_s), len(busy_until))
        busy_until[lane : lane + 1] = [read.end_s]
        placed.append((lane, read))
    return placed


def _token(events: Sequence[Event], begin_s: float, end_s: float) -> Token:
    inside = [event for event in events if event.end_s > begin_s and event.begin_s < end_s]

    def spent(kind: str) -> float:
        return sum(min(e.end_s, end_s) - max(e.begin_s, begin_s) for e in inside if e.kind == kind)

    wait_s, compute_s, sample_s = spent("wait"), spent("compute"), spent("sample")
    reads = [event for event in inside if event.kind == "read"]
    return Token(
        wait_s,
        compute_s,
        sample_s,
        max(end_s - begin_s - wait_s - compute_s - sample_s, 0.0),
        _covered([(max(read.begin_s, begin_s), min(read.end_s, end_s)) for read in reads]),
        sum(read.n_bytes for read in reads if read.end_s <= end_s),
    )


def _covered(spans: Iterable[tuple[float, float]]) -> float:
    covered_s, until = 0.0, float("-inf")
    for begin_s, end_s in sorted(spans):
        covered_s += max(end_s - max(begin_s, until), 0.0)
        until = max(until, end_s)
    return covered_s
