"""Long prompts of which only what matters is kept: the same tokens at every budget, and within each."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import engines
import numpy as np
import pytest
from engines import BACKENDS, engine_at, need, prepared_as, shrink

import edgelm
from edgelm.engine import filtered
from edgelm.engine.filtered import FilteredEngine
from edgelm.engine.filtering import FIRST, LAST
from edgelm.engine.generate import Conversation
from edgelm.engine.loading import Prepared, Request, replan
from edgelm.errors import BudgetTooSmall, ConfigError, ContextOverflow
from edgelm.sizes import GB
from edgelm.testing import tiny_model

CONTEXT, N_PROMPT = 1024, 700
IDS = np.random.default_rng(5).integers(3, 250, CONTEXT).tolist()


@pytest.fixture(autouse=True)
def _small_plans(monkeypatch: pytest.MonkeyPatch, known_rates: None) -> None:
    shrink(monkeypatch)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {
        "llama": tiny_model(folder / "llama.gguf", "llama", n_vocab=384, n_layers=5),
        "gemma3": tiny_model(folder / "gemma3.gguf", "gemma3", n_vocab=384),
    }


def prepared_at(path: Path, budget_bytes: int, backend: str = "numpy", kept: float = 0.25) -> Prepared:
    request = Request(budget_bytes, CONTEXT, 1, speculate=False, attention="filtered", kept=kept)
    return prepared_as(path, request, need(backend))


@contextmanager
def opened(prepared: Prepared) -> Iterator[FilteredEngine]:
    with engines.opened(prepared) as engine:
        assert isinstance(engine, FilteredEngine)
        yield engine


def floor(path: Path, backend: str = "numpy") -> int:
    with pytest.raises(BudgetTooSmall) as caught:
        prepared_at(path, 1, backend)
    return caught.value.needed_bytes


@pytest.mark.parametrize(
    ("architecture", "backend"), [*(("llama", one) for one in BACKENDS), ("gemma3", "numpy"), ("gemma3", "llamacpp")]
)
def test_a_budget_changes_neither_choice_nor_logits(models: dict[str, Path], architecture: str, backend: str) -> None:
    path, found = models[architecture], []
    for budget in (floor(path, need(backend)), GB):
        with opened(prepared_at(path, budget, backend)) as engine:
            conversation = Conversation(engine)
            assert conversation.prefill(IDS[:N_PROMPT]) == N_PROMPT
            assert engine.n_past == engine.filtering.n_kept == CONTEXT // 4
            found.append((conversation.stored, conversation.logits.copy()))
            assert engine.plan.streamed if budget != GB else not engine.plan.streamed
    assert found[0][0] == found[1][0]
    assert np.array_equal(found[0][1], found[1][1])


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_keys_are_those_of_the_whole_model(
    models: dict[str, Path], architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[np.ndarray] = []

    def noted(query: np.ndarray, keys: np.ndarray, spec: object) -> np.ndarray:
        seen.append(keys)
        return np.zeros(len(keys), np.float32)

    monkeypatch.setattr(filtered, "ranked", noted)
    with opened(prepared_at(models[architecture], GB)) as engine:
        kept = engine.look(IDS[:N_PROMPT])
        layer = engine.filtering.layer
        assert engine.n_past == 0
    assert kept == [*range(FIRST), *range(N_PROMPT - CONTEXT // 4 + FIRST, N_PROMPT)]
    with engine_at(models[architecture], GB, context=CONTEXT) as engine:
        engine.forward(IDS[:N_PROMPT])
        expected, _ = engine.arena.export(layer, 0, N_PROMPT)
    np.testing.assert_allclose(seen[0], expected, atol=5e-3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_prompt_that_fits_is_read_exactly(models: dict[str, Path], backend: str) -> None:
    ids = IDS[: CONTEXT // 4]
    with engine_at(models["llama"], GB, backend=need(backend), context=CONTEXT) as engine:
        plain = Conversation(engine)
        plain.prefill(ids)
        expected = plain.logits.copy()
    with opened(prepared_at(models["llama"], GB, backend)) as engine:
        conversation = Conversation(engine)
        assert conversation.prefill(ids) == len(ids)
        assert np.array_equal(conversation.logits, expected)
        assert conversation.prefill(ids) == 1  # what is stored is not computed again


def test_plans_count_less_and_go_over_to_other_budgets(models: dict[str, Path]) -> None:
    path = models["llama"]
    with engine_at(path, GB, context=CONTEXT) as engine:
        whole = engine.plan
    sizes = []
    for kept in (0.05, 0.25, 0.5):
        prepared = prepared_at(path, GB, kept=kept)
        plan = prepared.plan
        sizes.append(plan.demand.kv_bytes)
        assert plan.demand.n_kept == max(round(kept * CONTEXT), FIRST + LAST) < plan.places < CONTEXT
        assert plan.approximate == f"filtered attention: of a longer prompt {plan.demand.n_kept} tokens are kept"
        assert plan.as_dict()["approximate"] == plan.approximate
        assert plan.approximate in str(plan)
        with opened(prepared) as engine:
            least = replan(prepared, engine, floor(path) + 100_000)
            again = replan(prepared, engine, GB)
            assert (again.demand, again.context) == (plan.demand, CONTEXT)
            conversation = Conversation(engine)
            budgets = iter([least, again, least])

            def go_over(_: int, engine: FilteredEngine = engine, budgets: Iterator[Any] = budgets) -> None:
                if (plan := next(budgets, None)) is not None:
                    engine.carry_out(plan)

            conversation.prefill(IDS[:N_PROMPT])
            before = conversation.stored, conversation.logits.copy()
            conversation.prefill(IDS[:N_PROMPT], go_over)  # between the passes of the look
            assert conversation.stored == before[0]
            assert np.array_equal(conversation.logits, before[1])
    assert sizes == sorted(sizes)
    assert sizes[-1] < whole.demand.kv_bytes
    assert whole.approximate is None


def load(path: Path, **options: Any) -> edgelm.Model:
    return edgelm.load(path, **{"memory": 2 * GB, "backend": "numpy", "threads": 1, "context": 512, **options})


def test_answers_say_that_they_are_approximate_and_go_on(models: dict[str, Path]) -> None:
    def answer(model: edgelm.Model, n: int) -> list[edgelm.Chunk]:
        return list(model.stream_ids(IDS[:n], max_tokens=20, ignore_eos=True))

    with load(models["llama"]) as model:
        exact, short = answer(model, 400), answer(model, 100)
        assert exact[-1].usage.approximate is None
    with load(models["llama"], attention="filtered", kept=1.0) as model:
        assert [one.token_id for one in answer(model, 400)] == [one.token_id for one in exact]
        assert model.plan.approximate is None
    with load(models["llama"], attention="filtered") as model:
        assert any("approximate" in note for note in model.notes)
        assert [one.token_id for one in answer(model, 100)] == [one.token_id for one in short]
        first, again = answer(model, 400), answer(model, 400)
        assert [one.token_id for one in first] == [one.token_id for one in again]
        usage = first[-1].usage
        assert (usage.prompt_tokens, usage.cached_tokens, usage.completion_tokens) == (400, 0, 20)
        assert usage.approximate == "filtered attention: of a longer prompt 128 tokens are kept"
        assert len(model.score_ids(IDS[:420], 400).logprobs) == 20
        until_full = list(model.stream_ids(IDS[:300], ignore_eos=True))
        assert until_full[-1].finish_reason == "length"
        assert until_full[-1].usage.completion_tokens == 512 - 300 + 1


def test_what_an_approximation_cannot_do_is_refused(models: dict[str, Path], tmp_path: Path) -> None:
    with load(models["llama"], attention="filtered") as model:
        with pytest.raises(ContextOverflow):
            list(model.stream_ids(IDS[:512]))
        with pytest.raises(ConfigError, match="not the whole conversation"):
            model.save_cache(tmp_path / "cache")
        with pytest.raises(ConfigError, match="one answer at a time"):
            model.samples_of(IDS[:40], 2)
    with pytest.raises(ConfigError, match="unknown attention"):
        load(models["llama"], attention="fast")
    with pytest.raises(ConfigError, match="exact attention keeps everything"):
        edgelm.plan(models["llama"], kept=0.5)
