"""Layouts of weights and caches of a backend's own: the bits of plain NumPy, resident and streamed, one preparation."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import layout_backends
import numpy as np
import pytest
from engines import CHUNK, budgets, engine_at, prepared_at, shrink, some_by_default
from numpy.typing import NDArray

from edgelm.engine import registry
from edgelm.engine.forward import Engine
from edgelm.engine.loading import build, replan
from edgelm.errors import BudgetTooSmall
from edgelm.memory.stores import MemoryStore
from edgelm.memory.verified import verified
from edgelm.sizes import GB
from edgelm.testing import ARCHITECTURES, tiny_model
from edgelm.testing.evaluate import evaluate

N_VOCAB = 384
IDS = np.random.default_rng(7).integers(3, 250, 48).tolist()
N_PROMPT = 40
OWN = ("shuffled", "cached", "adopting")


@pytest.fixture(autouse=True)
def _backends(monkeypatch: pytest.MonkeyPatch) -> None:
    shrink(monkeypatch)
    for name, target in layout_backends.NAMES.items():
        monkeypatch.setitem(registry.BACKENDS, name, target)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {name: tiny_model(folder / f"{name}.gguf", name, n_vocab=N_VOCAB) for name in ARCHITECTURES}


def walk(engine: Engine, ids: Sequence[int] = IDS) -> NDArray[np.float32]:
    rows = [engine.forward(ids[:N_PROMPT])[-1].copy()]
    rows += [engine.forward([token])[-1].copy() for token in ids[N_PROMPT:]]
    return np.stack(rows)


def bits_of(path: Path, backend: str) -> NDArray[np.float32]:
    """Return the logits that a backend should give: NumPy's, unless what a window sees lies in another order."""
    with engine_at(path, GB) as plain, engine_at(path, GB, backend=backend) as own:
        expected, found = walk(plain), walk(own)
        if own.arena.capacities == plain.arena.capacities:
            return expected
        assert backend == "cached"
        assert np.abs(found - expected).max() < 1e-3
        return found


@pytest.mark.parametrize("backend", OWN)
@pytest.mark.parametrize("architecture", some_by_default(ARCHITECTURES))
def test_other_layouts_have_the_bits_of_the_files(models: dict[str, Path], architecture: str, backend: str) -> None:
    path = models[architecture]
    expected = bits_of(path, backend)
    streamed = []
    for budget in budgets(path, backend=backend):
        with engine_at(path, budget, backend=backend) as engine:
            assert engine.plan.chunk == CHUNK
            assert engine.plan.planned_bytes <= budget
            streamed.append(engine.plan.streamed_bytes)
            assert np.array_equal(walk(engine), expected)
    assert streamed[0] > streamed[2] > streamed[-1] == 0


@pytest.mark.parametrize("backend", OWN)
@pytest.mark.parametrize("architecture", ["llama", "gemma3", "olmo2"])
def test_a_budget_may_change_under_every_layout(models: dict[str, Path], architecture: str, backend: str) -> None:
    path, rng = models[architecture], np.random.default_rng(5)
    expected = bits_of(path, backend)
    *_, most = budgets(path, backend=backend)
    prepared = prepared_at(path, most, backend=backend)
    engine = build(prepared, MemoryStore([part.read_bytes() for part in prepared.file.paths]))
    try:
        with pytest.raises(BudgetTooSmall) as caught:
            replan(prepared, engine, 1)
        found = [engine.forward(IDS[:N_PROMPT])[-1].copy()]
        for i, token in enumerate(IDS[N_PROMPT:]):
            budget = most if i % 3 == 0 else int(rng.integers(caught.value.needed_bytes, most + 1))
            engine.carry_out(replan(prepared, engine, budget))
            assert engine.plan.planned_bytes <= budget
            found.append(engine.forward([token])[-1].copy())
        assert np.array_equal(np.stack(found), expected)
    finally:
        engine.close()


def test_rows_of_a_packed_head_are_looked_up_in_the_file(models: dict[str, Path]) -> None:
    prepared = prepared_at(models["llama"], GB, backend="shuffled")
    prepared.session.close()
    head, rows = prepared.model.matrices[-1], prepared.model.embedding
    assert (head.name, head.file, rows.file) == (rows.name, 0, 1)
    assert head.row_bytes == head.packed_row_bytes > rows.row_bytes
    assert head.type is rows.type


def test_what_a_layout_leaves_alone_stays_in_its_file(tmp_path: Path) -> None:
    path = tiny_model(tmp_path / "tiny.gguf", "llama", types="F16", n_vocab=N_VOCAB)
    with engine_at(path, GB) as engine:
        expected = walk(engine)
    with engine_at(path, GB, backend="shuffled") as engine:
        assert np.array_equal(walk(engine), expected)
    prepared = prepared_at(path, GB, backend="shuffled")
    prepared.session.close()
    assert prepared.file.paths == (path,)


class Watching(layout_backends.AdoptingSession):
    """Notes how much the weights take, here and in the core, whenever one is copied."""

    engine: Engine | None = None
    most_bytes = 0

    def adopt(self, weight: layout_backends.Weight, address: int, matrix: bool) -> int:
        handle = super().adopt(weight, address, matrix)
        if self.engine is not None:
            self.most_bytes = max(self.most_bytes, self.copied_bytes + self.engine._pinned.memory_bytes)
        return handle


@pytest.mark.parametrize("architecture", ["llama", "phi3"])
def test_adopted_weights_are_never_in_memory_twice(
    models: dict[str, Path], architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgelm.memory import plan as planning

    monkeypatch.setattr(planning, "RESIDENT_UNIT_BYTES", 16_384)
    monkeypatch.setattr(layout_backends, "AdoptingSession", Watching)
    path = models[architecture]
    most = budgets(path, 2, backend="adopting")[1]
    prepared = prepared_at(path, most, backend="adopting")
    session = prepared.session
    assert isinstance(session, Watching)
    engine = build(prepared, MemoryStore([part.read_bytes() for part in prepared.file.paths]))
    try:
        plan = engine.plan
        assert session.copied_bytes <= plan.pinned_bytes + plan.demand.constants_bytes
        assert engine._pinned.memory_bytes == 0
        assert 0 < plan.staging_bytes <= 16_384 + 8192
        with pytest.raises(BudgetTooSmall) as caught:
            replan(prepared, engine, 1)
        session.engine = engine
        n_adopted = session.n_adopted
        for budget in (caught.value.needed_bytes, (most + caught.value.needed_bytes) // 2, most):
            session.most_bytes = 0
            engine.carry_out(replan(prepared, engine, budget))
            plan = engine.plan
            weights = plan.pinned_bytes + plan.slots_bytes + plan.staging_bytes + plan.demand.constants_bytes
            assert session.most_bytes <= weights
            assert session.copied_bytes <= plan.pinned_bytes + plan.demand.constants_bytes
        assert session.n_adopted > n_adopted
    finally:
        engine.close()
    assert session.copied_bytes == 0


def test_who_does_not_stream_is_given_everything_or_refused(models: dict[str, Path]) -> None:
    path = models["llama"]
    with pytest.raises(BudgetTooSmall) as caught:
        prepared_at(path, 1, backend="whole")
    with engine_at(path, GB) as plain, engine_at(path, caught.value.needed_bytes, backend="whole") as engine:
        assert not engine.plan.streamed
        assert np.array_equal(walk(engine), walk(plain))
    with pytest.raises(BudgetTooSmall):
        prepared_at(path, caught.value.needed_bytes - 1, backend="whole")


def test_a_flipped_bit_in_a_prepared_file_is_found(models: dict[str, Path]) -> None:
    path = models["llama"]
    prepared = prepared_at(path, budgets(path, backend="shuffled")[1], backend="shuffled")
    contents = [bytearray(part.read_bytes()) for part in prepared.file.paths]
    info = prepared.model.matrices[3]
    contents[0][info.offset + info.n_bytes // 2] ^= 1
    load = partial(build, prepared, verified(MemoryStore(contents), prepared.file))
    from edgelm.files.errors import DamagedWeights

    with pytest.raises(DamagedWeights, match=r"rm --prepared"):
        walk(load())
    prepared.session.close()


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_a_prompt_read_by_one_backend_is_answered_by_another(models: dict[str, Path], architecture: str) -> None:
    """Through a cache of other items, another order and no rings, and back: the bits of never having left."""
    path = models[architecture]
    with engine_at(path, GB) as plain, engine_at(path, GB) as back, engine_at(path, GB, backend="cached") as other:
        expected = walk(plain)
        plain.arena.truncate(0)
        plain.forward(IDS[:N_PROMPT])
        other.arena.copy_from(plain.arena)
        assert np.abs(other.forward(IDS[N_PROMPT : N_PROMPT + 1])[-1] - expected[1]).max() < 1e-3
        assert other.arena.truncate(N_PROMPT) == N_PROMPT
        back.arena.copy_from(other.arena)
        found = np.stack([back.forward([token])[-1].copy() for token in IDS[N_PROMPT:]])
        assert np.array_equal(found, expected[1:])


def test_evaluating_lays_weights_and_caches_out(models: dict[str, Path]) -> None:
    for architecture in ("llama", "gemma3"):
        expected = evaluate(models[architecture], IDS, passes=(40, 8))
        for backend in OWN:
            assert np.array_equal(evaluate(models[architecture], IDS, passes=(40, 8), backend=backend), expected)
