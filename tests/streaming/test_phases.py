"""One backend fills the cache with prompts, another answers from it: whatever the two, at every budget."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import layout_backends
import numpy as np
import pytest
from engines import engine_at, in_layout, need, shrink
from numpy.typing import NDArray

from edgelm.engine import registry
from edgelm.engine.loading import Request
from edgelm.engine.phased import LEAST_PROMPT, PhasedEngine
from edgelm.engine.phases import Phase, Sources, build, prepare, replan
from edgelm.engine.registry import get_backend
from edgelm.errors import BudgetTooSmall, Cancelled
from edgelm.memory.arena import KVArena
from edgelm.memory.stores import MemoryStore
from edgelm.sizes import GB
from edgelm.testing import tiny_model

IDS = np.random.default_rng(7).integers(3, 250, 62).tolist()
PROMPT, ANSWER, QUESTION = IDS[:40], IDS[40:44], IDS[44:]
PAIRS = [
    ("npu", "numpy"),
    ("npu", "llamacpp"),
    ("numpy", "llamacpp"),
    ("numpy", "npu"),
    ("cached", "numpy"),
    ("numpy", "cached"),
    ("adopting", "cached"),
    ("shuffled", "adopting"),
]


@pytest.fixture(autouse=True)
def _backends(monkeypatch: pytest.MonkeyPatch) -> None:
    shrink(monkeypatch)
    for name, target in layout_backends.NAMES.items():
        monkeypatch.setitem(registry.BACKENDS, name, target)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {name: tiny_model(folder / f"{name}.gguf", name, n_vocab=384) for name in ("llama", "gemma3")}


@contextmanager
def phased_at(
    path: Path, prompts: str, answers: str, budget_bytes: int = GB, speculate: bool = True
) -> Iterator[PhasedEngine]:
    phases = []
    for name in (answers, prompts):
        backend = get_backend(need(name) if name == "llamacpp" else name)
        session = backend.open(1)
        phases.append(Phase(in_layout(path, backend), backend, session, None))
    try:
        prepared = prepare(phases[0], Request(budget_bytes, 64, speculate=speculate), 0, phases[1])
    except BaseException:
        for phase in phases:
            phase.session.close()
        raise
    stores = [MemoryStore([part.read_bytes() for part in phase.file.paths]) for phase in phases]
    engine = build(prepared, [Sources(store) for store in stores])
    assert isinstance(engine, PhasedEngine)
    engine.prepared = prepared  # type: ignore[attr-defined]
    try:
        yield engine
    finally:
        engine.close()


def stored(arena: KVArena, first: int, n: int) -> list[NDArray[np.float32]]:
    """Return keys and values of every layer from position `first` on, as far back as they are held."""
    found = []
    for layer in range(len(arena.keys)):
        begin = max(first, int(arena.held(layer)[0]))
        found += arena.export(layer, begin, n - begin)
    return found


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
@pytest.mark.parametrize(("prompts", "answers"), PAIRS, ids=map("+".join, PAIRS))
def test_answers_are_those_of_one_backend_on_the_same_cache(
    models: dict[str, Path], architecture: str, prompts: str, answers: str
) -> None:
    """The cache is that of the prompts' backend alone; on this cache, the answers' backend alone has the same bits."""
    path, n_before = models[architecture], len(PROMPT) - 1
    with (
        phased_at(path, prompts, answers) as both,
        engine_at(path, GB, backend=prompts) as filling,
        engine_at(path, GB, backend=answers) as alone,
    ):
        filling.forward(PROMPT[:n_before])
        alone.arena.copy_from(filling.arena)
        assert np.array_equal(both.forward(PROMPT), alone.forward(PROMPT[n_before:]))
        window = 24  # what rings still hold when one more position is stored
        for ours, theirs in zip(
            stored(both.arena, n_before - window, n_before),
            stored(alone.arena, n_before - window, n_before),
            strict=True,
        ):
            assert np.array_equal(ours, theirs)
        for token in ANSWER:
            assert np.array_equal(both.forward([token]), alone.forward([token]))
        assert both.n_past == alone.n_past


@pytest.mark.parametrize(("prompts", "answers"), [("shuffled", "numpy"), ("cached", "numpy")])
def test_what_was_answered_is_there_for_the_next_prompt(models: dict[str, Path], prompts: str, answers: str) -> None:
    assert len(QUESTION) > LEAST_PROMPT
    with phased_at(models["llama"], prompts, answers) as both, engine_at(models["llama"], GB) as plain:
        for engine in (both, plain):
            engine.forward(PROMPT)
            for token in ANSWER:
                engine.forward([token])
        ours, theirs = both.forward(QUESTION), plain.forward(QUESTION)
        assert np.abs(ours - theirs).max() < 1e-3  # kernels add one row up in another order than several
        assert both.n_past == len(IDS)


@pytest.mark.parametrize(("prompts", "answers"), [("npu", "numpy"), ("cached", "numpy")])
def test_every_budget_gives_the_same_answers(models: dict[str, Path], prompts: str, answers: str) -> None:
    path = models["llama"]
    with pytest.raises(BudgetTooSmall) as caught, phased_at(path, prompts, answers, 1):
        pass
    least = caught.value.needed_bytes
    with phased_at(path, prompts, answers, speculate=False) as engine:
        most, expected = engine.plan.planned_bytes, engine.forward(PROMPT).copy()
    streamed = []
    for budget in [least + (most - least) * i // 4 for i in range(5)]:
        with phased_at(path, prompts, answers, budget, speculate=False) as engine:
            plan = engine.plan
            assert plan.prompts is not None
            assert plan.planned_bytes <= budget
            assert plan.demand.beside_bytes == plan.prompts.planned_bytes
            assert dict(plan.items())["prompts on another backend"] == plan.prompts.planned_bytes
            streamed.append(plan.streamed_bytes + plan.prompts.streamed_bytes)
            assert np.array_equal(engine.forward(PROMPT), expected)
            assert (engine.bytes_streamed > 0) == (streamed[-1] > 0)
    assert streamed[0] > streamed[2] > streamed[-1] == 0
    with pytest.raises(BudgetTooSmall), phased_at(path, prompts, answers, least - 1):
        pass


def test_a_budget_may_change_between_prompt_and_answer(models: dict[str, Path]) -> None:
    path = models["llama"]
    with pytest.raises(BudgetTooSmall) as caught, phased_at(path, "npu", "numpy", 1):
        pass
    with phased_at(path, "npu", "numpy") as engine:
        expected = [engine.forward(PROMPT).copy(), *(engine.forward([token]).copy() for token in ANSWER)]
    with phased_at(path, "npu", "numpy") as engine:
        most, prepared = engine.plan.planned_bytes, engine.prepared  # type: ignore[attr-defined]
        found = [engine.forward(PROMPT).copy()]
        for token, share in zip(ANSWER, (0.0, 0.7, 0.3, 1.0), strict=True):
            budget = int(caught.value.needed_bytes * (1 - share) + most * share)
            engine.carry_out(replan(prepared, engine, budget))
            assert engine.plan.planned_bytes <= budget
            found.append(engine.forward([token]).copy())
        assert not engine.plan.streamed
        with pytest.raises(BudgetTooSmall):
            replan(prepared, engine, caught.value.needed_bytes // 2)
    assert np.array_equal(found, expected)


def test_the_prompts_need_neither_the_head_nor_the_end_of_the_last_block(models: dict[str, Path]) -> None:
    with phased_at(models["llama"], "npu", "numpy") as engine:
        prompts, answers = (
            {part.tensor for unit in one.plan.units for part in unit.parts} for one in (engine.prompts, engine)
        )
    last = max(name for name in answers if name.startswith("blk."))[: len("blk.0.")]
    ends = {last + name for name in ("attn_output.weight", "ffn_up.weight", "ffn_gate.weight", "ffn_down.weight")}
    assert answers - prompts - {"token_embd.weight", "output.weight"} == ends


@pytest.mark.parametrize("prompts", ["npu", "cached"])
def test_a_prompt_that_is_broken_off_leaves_what_is_stored(models: dict[str, Path], prompts: str) -> None:
    with phased_at(models["llama"], prompts, "numpy") as engine:
        with pytest.raises(Cancelled):
            engine.forward(PROMPT, progress=lambda done: engine.cancel())
        kept = engine.n_past
        assert 0 < kept < len(PROMPT) - 1
        engine.cancel(False)
        resumed = engine.forward(PROMPT[kept:]).copy()
        with phased_at(models["llama"], prompts, "numpy") as whole:
            assert np.abs(whole.forward(PROMPT) - resumed).max() < 1e-2


def test_short_prompts_stay_with_the_backend_of_the_answers(models: dict[str, Path]) -> None:
    with phased_at(models["llama"], "npu", "numpy") as both, engine_at(models["llama"], GB) as plain:
        ids = PROMPT[:LEAST_PROMPT]
        assert np.array_equal(both.forward(ids), plain.forward(ids))
        assert not np.array_equal(both.forward(PROMPT[LEAST_PROMPT:]), plain.forward(PROMPT[LEAST_PROMPT:]))


@pytest.mark.parametrize(("prompts", "answers"), [("npu", "numpy"), ("cached", "numpy"), ("numpy", "cached")])
def test_guesses_are_verified_by_the_backend_of_the_answers(
    models: dict[str, Path], prompts: str, answers: str
) -> None:
    """A kept path of a tree is handed over to the next prompt as if it had been appended."""
    parents = (-1, -1, 1, 2, 1)
    with (
        phased_at(models["gemma3"], prompts, answers) as guessing,
        phased_at(models["gemma3"], prompts, answers) as one,
    ):
        assert guessing.max_rows == 16
        for engine in (guessing, one):
            engine.forward(PROMPT)
        guessing.verify([9, ANSWER[0], ANSWER[1], ANSWER[2], 8], parents)
        guessing.keep((1, 2, 3))
        for token in ANSWER[:3]:
            one.forward([token])
        ours, theirs = guessing.forward(QUESTION), one.forward(QUESTION)
        assert guessing.n_past == one.n_past
        assert np.abs(ours - theirs).max() < 0.05
    with pytest.raises(BudgetTooSmall) as caught, phased_at(models["gemma3"], prompts, answers, 1):
        pass
    with phased_at(models["gemma3"], prompts, answers, caught.value.needed_bytes) as engine:
        assert engine.max_rows == 1  # the first that is given up
