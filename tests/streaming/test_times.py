"""What an engine that streams records: every run computed, every byte read, and sums that fit the events."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from engines import budgets, engine_at, shrink

from edgelm.engine.generate import Conversation, token_ids
from edgelm.engine.sampling import Sampling, make_sampler
from edgelm.memory.timeline import Event
from edgelm.testing import tiny_model

PROMPT = [5, 6, 7, 8, 9]


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shrink(monkeypatch)
    return tiny_model(tmp_path / "tiny.gguf", "olmo2", n_layers=4, n_vocab=512)


def of(events: tuple[Event, ...], kind: str) -> list[Event]:
    return [event for event in events if event.kind == kind]


def test_a_pass_that_streams_is_recorded(path: Path) -> None:
    n_tokens = 6
    with engine_at(path, budgets(path)[1]) as engine:
        conversation = Conversation(engine)
        conversation.prefill(PROMPT)
        streamed = engine.window.bytes_streamed
        before_s = engine.window.times.sums_s()
        with engine.window.times.recording() as timeline:
            list(token_ids(conversation, PROMPT, make_sampler(Sampling()), max_tokens=n_tokens))
        after_s = engine.window.times.sums_s()
        events = timeline.events()
        passes = n_tokens - 1  # the last token is sampled only
        computed = Counter(event.index for event in of(events, "compute"))
        assert set(computed) == set(range(len(engine.window.runs)))
        assert set(computed.values()) == {passes}
        assert [event.index for event in of(events, "sample")] == list(range(1, n_tokens + 1))
        assert {event.index for event in of(events, "read")} == set(engine.window.cycle)
        read = sum(event.n_bytes for event in of(events, "read"))
        # reads go on until every slot is full: some were counted before or after the recording ended
        assert abs(read - passes * engine.plan.streamed_bytes) <= engine.plan.slots_bytes
        assert engine.window.bytes_streamed - streamed >= passes * engine.plan.streamed_bytes - engine.plan.slots_bytes
    assert timeline.dropped == 0
    assert all(event.end_s - event.begin_s >= 0 for event in events)
    for kind in ("compute", "wait", "sample"):
        total_s = sum(event.end_s - event.begin_s for event in of(events, kind))
        assert total_s == pytest.approx(after_s[kind] - before_s[kind])  # type: ignore[index]


def test_what_is_resident_is_neither_read_nor_waited_for(path: Path) -> None:
    with engine_at(path, budgets(path)[-1]) as engine:
        with engine.window.times.recording() as timeline:
            engine.forward(PROMPT)
        assert {event.kind for event in timeline.events()} == {"compute"}
        assert engine.window.times.sums_s()["read"] == engine.window.times.sums_s()["wait"] == 0
