"""A budget that changes under a running model: other memory, the same bits."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engines import BACKENDS, budgets, need, prepared_at, shrink

import edgelm
from edgelm.engine.forward import Engine
from edgelm.engine.loading import build, replan
from edgelm.errors import BudgetTooSmall, Cancelled, ConfigError
from edgelm.files.errors import TruncatedFile
from edgelm.memory.stores import MemoryStore
from edgelm.sizes import GB
from edgelm.testing import tiny_model

IDS = np.random.default_rng(11).integers(3, 250, 60).tolist()
N_PROMPT = 20


@pytest.fixture(autouse=True)
def _small_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    shrink(monkeypatch, 16, 8, 4)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {name: tiny_model(folder / f"{name}.gguf", name, n_vocab=384) for name in ("llama", "gemma3", "olmo2")}


def owned_bytes(engine: Engine) -> int:
    return engine.window.memory_bytes + engine._pinned.memory_bytes


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("architecture", ["llama", "gemma3", "olmo2"])
def test_twenty_changes_change_no_bit(models: dict[str, Path], architecture: str, backend: str) -> None:
    path, rng = models[architecture], np.random.default_rng(5)
    least, *_, most = budgets(path, backend=need(backend))
    still = prepared_at(path, most, backend=backend)
    moving = prepared_at(path, most, backend=backend)
    store = MemoryStore([part.read_bytes() for part in still.file.paths])
    engines = [build(prepared, store) for prepared in (still, moving)]
    try:
        expected, found = (engine.forward(IDS[:N_PROMPT])[-1].copy() for engine in engines)
        assert np.array_equal(found, expected)
        engine, streamed = engines[1], set[int]()
        for i, token in enumerate(IDS[N_PROMPT:]):
            if i % 2:
                # the floor of a cache that was made for wide passes may lie higher
                floor = floor_of(moving, engine)
                budget = most if i % 7 == 0 else int(rng.integers(floor, most + 1))
                engine.carry_out(replan(moving, engine, budget))
                plan = engine.plan
                assert plan.planned_bytes <= budget
                assert owned_bytes(engine) <= plan.pinned_bytes + plan.slots_bytes + plan.demand.constants_bytes + 1
                assert engine.workspace._buffer.n_bytes <= plan.demand.state_bytes
                streamed.add(plan.streamed_bytes)
            expected, found = (one.forward([token])[-1].copy() for one in engines)
            assert np.array_equal(found, expected), f"token {i}"
        assert len(streamed) > 5
        assert least <= most
    finally:
        for engine in engines:
            engine.close()


def floor_of(prepared: Any, engine: Engine) -> int:
    with pytest.raises(BudgetTooSmall) as caught:
        replan(prepared, engine, 1)
    return caught.value.needed_bytes


def test_prompts_after_a_change_use_the_new_plan(models: dict[str, Path]) -> None:
    path = models["gemma3"]
    prepared = prepared_at(path, GB)
    engine = build(prepared, MemoryStore([path.read_bytes()]))
    try:
        assert engine.plan.chunk == 16
        expected = engine.forward(IDS[:40])[-1].copy()
        engine.carry_out(replan(prepared, engine, floor_of(prepared, engine)))
        assert engine.plan.chunk == 4
        engine.arena.truncate(0)
        assert np.abs(engine.forward(IDS[:40])[-1] - expected).max() < 1e-3
        engine.carry_out(replan(prepared, engine, GB))
        assert engine.plan.chunk == 16
        engine.arena.truncate(0)
        assert np.array_equal(engine.forward(IDS[:40])[-1], expected)
    finally:
        engine.close()


class FailingStore(MemoryStore):
    failing = False

    def read_into(self, file: int, offset: int, n_bytes: int, buffer: memoryview, at: int) -> int:
        if self.failing:
            raise TruncatedFile("file", "it is gone", "build it again")
        return super().read_into(file, offset, n_bytes, buffer, at)


def test_a_change_that_fails_to_read_closes_the_engine(models: dict[str, Path]) -> None:
    path = models["llama"]
    store = FailingStore([path.read_bytes()])
    prepared = prepared_at(path, budgets(path)[0])
    engine = build(prepared, store)
    engine.forward(IDS[:5])
    store.failing = True
    with pytest.raises(TruncatedFile):
        engine.carry_out(replan(prepared, engine, GB))
    with pytest.raises(Cancelled, match="closed"):
        engine.forward(IDS[:1])


# --- the public model: real budgets of the whole process


@pytest.fixture
def model(tmp_path: Path) -> Any:
    path = tiny_model(tmp_path / "tiny.gguf", "llama", n_vocab=384)
    with edgelm.load(path, memory="700MB", backend="numpy", context=64) as loaded:
        yield loaded


def ids_of(model: edgelm.Model, change: Sequence[str] = ()) -> list[int | None]:
    found, waiting = [], list(change)
    for chunk in model.stream("once upon", max_tokens=12, ignore_eos=True):
        found.append(chunk.token_id)
        if waiting:
            plan = model.set_budget(waiting.pop(0))
            assert model.plan is plan
    return found


def test_the_consumer_of_a_stream_may_change_the_budget(model: edgelm.Model) -> None:
    expected = ids_of(model)
    assert ids_of(model, ["700MB", "600MB", "800MB"]) == expected
    assert model.plan.budget_bytes == 800_000_000


def test_another_thread_may_change_the_budget_while_a_stream_runs(model: edgelm.Model) -> None:
    expected = ids_of(model)
    stop, errors, n_changes = threading.Event(), list[BaseException](), 0

    def change() -> None:
        nonlocal n_changes
        try:
            while not stop.is_set():
                model.set_budget("600MB" if n_changes % 2 else "700MB")
                n_changes += 1
        except BaseException as exc:
            errors.append(exc)

    thread = threading.Thread(target=change)
    thread.start()
    try:
        for _ in range(4):
            assert ids_of(model) == expected
    finally:
        stop.set()
        thread.join(20)
    assert not thread.is_alive()
    assert not errors
    assert n_changes > 4, "the stream kept visitors out"


def test_a_budget_that_is_too_small_changes_nothing(model: edgelm.Model) -> None:
    before, expected = model.plan, ids_of(model)
    with pytest.raises(BudgetTooSmall):
        model.set_budget("1MB")
    assert model.plan is before
    assert ids_of(model) == expected


def test_a_processor_cannot_change_the_budget(model: edgelm.Model) -> None:
    def meddle(history: Sequence[int], logits: Any) -> Any:
        model.set_budget("600MB")
        return logits

    with pytest.raises(ConfigError, match="between two chunks"):
        model.generate("once", max_tokens=2, processors=[meddle])


def test_a_closed_model_has_no_budget(tmp_path: Path) -> None:
    path = tiny_model(tmp_path / "tiny.gguf", "llama", n_vocab=384)
    model = edgelm.load(path, memory="700MB", backend="numpy", context=64)
    model.close()
    with pytest.raises(ConfigError, match="closed"):
        model.set_budget("600MB")
