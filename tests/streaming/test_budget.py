"""The floor of a budget is real: it works, a byte less does not, and engines own no more than their plan says."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from engines import BACKENDS, budgets, engine_at, need, plan_at, shrink

from edgelm.engine.loading import Request
from edgelm.errors import BudgetTooSmall, ConfigError
from edgelm.memory.stores import CountingStore, Store
from edgelm.sizes import GB
from edgelm.testing import tiny_model

IDS = list(range(3, 43))


@pytest.fixture(autouse=True)
def _small_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    shrink(monkeypatch, 32, 16, 8, 4, 1)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {name: tiny_model(folder / f"{name}.gguf", name, n_vocab=384) for name in ("llama", "gemma2", "olmo2")}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("architecture", ["llama", "gemma2", "olmo2"])
def test_the_floor_works_and_a_byte_less_does_not(models: dict[str, Path], architecture: str, backend: str) -> None:
    path = models[architecture]
    least = budgets(path, 2, need(backend))[0]
    assert plan_at(path, least, backend).planned_bytes <= least
    with pytest.raises(BudgetTooSmall) as caught:
        plan_at(path, least - 1, backend)
    assert caught.value.needed_bytes == least
    assert len(caught.value.items) == 3
    with engine_at(path, least, backend=backend) as engine:
        assert np.isfinite(engine.forward(IDS)).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_budget_above_the_floor_works(models: dict[str, Path], backend: str) -> None:
    """No budget in between is refused because a chunk was chosen that then did not fit."""
    path = models["gemma2"]
    for budget in budgets(path, 16, need(backend)):
        assert plan_at(path, budget, backend).planned_bytes <= budget


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_an_engine_owns_what_its_plan_says(models: dict[str, Path], architecture: str) -> None:
    path = models[architecture]
    for budget in budgets(path):
        with engine_at(path, budget) as engine:
            demand = engine.plan.demand
            weights = engine.plan.pinned_bytes + engine.plan.slots_bytes + demand.constants_bytes
            assert engine.window.memory_bytes + engine._pinned.memory_bytes <= weights + 1
            assert engine.arena.n_bytes == demand.kv_bytes
            workspace = engine.workspace._buffer.n_bytes + engine.workspace.row_buffer.n_bytes
            assert workspace <= demand.state_bytes


def test_a_decode_pass_reads_what_the_plan_says(models: dict[str, Path]) -> None:
    path = models["olmo2"]
    counting: list[CountingStore] = []

    def wrap(store: Store) -> Store:
        counting.append(CountingStore(store))
        return counting[0]

    with engine_at(path, budgets(path)[1], wrap=wrap) as engine:
        engine.forward(IDS)
        streamed, reads = engine.window.bytes_streamed, counting[0].snapshot()
        for token in IDS[:10]:
            engine.forward([token])
        passes = (engine.window.bytes_streamed - streamed) / engine.plan.streamed_bytes
        slots = engine.plan.slots_bytes / engine.plan.streamed_bytes
        assert abs(passes - 10) <= slots  # but for what was, and is, read ahead
        assert (counting[0].snapshot() - reads).read_bytes >= 9 * engine.plan.streamed_bytes


def test_more_memory_never_streams_more_at_the_same_chunk(
    models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    shrink(monkeypatch, 16)
    path = models["llama"]
    plans = [plan_at(path, budget) for budget in budgets(path, 12)]
    least_slot = plans[0].slot_bytes
    for poor, rich in pairwise(plans):
        assert rich.streamed_bytes <= poor.streamed_bytes + 4 * max(least_slot, rich.slot_bytes)
    assert plans[-1].streamed_bytes == 0 < plans[0].streamed_bytes


def test_an_open_context_is_halved_before_a_budget_is_refused(tmp_path: Path) -> None:
    path = tiny_model(tmp_path / "tiny.gguf", "llama", n_vocab=384, n_context=2048)
    least = budgets(path, 2, context=512)[0]
    with engine_at(path, least + 50_000, context=None) as engine:  # type: ignore[arg-type]
        assert engine.plan.context == 512
    with pytest.raises(BudgetTooSmall):
        plan_at(path, least + 50_000, context=2048)


def test_requests_are_checked() -> None:
    with pytest.raises(ConfigError, match="context"):
        Request(GB, context=8)
    with pytest.raises(ConfigError, match="max_outputs"):
        Request(GB, max_outputs=100)
