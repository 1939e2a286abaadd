"""A draft model beside its target: the same tokens, one budget, and the first to go when memory is short."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edgelm
from edgelm import opening
from edgelm.errors import BudgetTooSmall, ConfigError
from edgelm.memory.predict import Rates
from edgelm.sizes import GB
from edgelm.testing import tiny_model

IDS = np.random.default_rng(4).integers(3, 250, 20).tolist()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    made = {name: tiny_model(folder / f"{name}.gguf", name, n_vocab=384) for name in ("llama", "gemma3")}
    made["large"] = tiny_model(folder / "large.gguf", "llama", n_vocab=384, n_embd=256, n_ff=1024, n_layers=8)
    return made | {"other": tiny_model(folder / "other.gguf", "qwen2", n_vocab=1024)}


@pytest.fixture(autouse=True)
def _flash_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wide passes cost what narrow ones do."""
    rates = Rates(1e6, 1e9, wide_bytes_per_s=1e12)
    monkeypatch.setattr(opening, "measured_rates", lambda *_, **__: rates)


def load(path: Path, **options: Any) -> edgelm.Model:
    return edgelm.load(path, **{"memory": GB, "backend": "numpy", "threads": 1, "context": 128, **options})


def floor_of(path: Path) -> int:
    """Return the smallest budget that works; the error itself would keep what was loaded."""
    try:
        load(path, memory=1, speculate=False)
    except BudgetTooSmall as refused:
        return refused.needed_bytes
    raise AssertionError("a budget of one byte was enough")


def answer(model: edgelm.Model, **options: Any) -> tuple[list[int], edgelm.Usage]:
    chunks = list(model.stream_ids(IDS, max_tokens=60, ignore_eos=True, **options))
    return [chunk.token_id for chunk in chunks if chunk.token_id is not None], chunks[-1].usage


@pytest.fixture
def both(files: dict[str, Path]) -> Iterator[edgelm.Model]:
    """The model drafts for itself."""
    with load(files["llama"], draft=files["llama"]) as model:
        yield model


def test_a_draft_changes_no_token_and_most_of_its_guesses_are_right(files: dict[str, Path], both: edgelm.Model) -> None:
    with load(files["llama"], speculate=False) as model:
        expected, plain = answer(model)
    found, usage = answer(both)
    assert found == expected
    assert (plain.drafted_tokens, plain.passes) == (0, 59)
    assert usage.accepted_tokens > 0.9 * usage.drafted_tokens > 0
    assert usage.passes == 59 - usage.accepted_tokens
    assert usage.tokens_per_pass > 2


def test_a_draft_counts_against_the_budget(files: dict[str, Path], both: edgelm.Model) -> None:
    items = dict(both.plan.items())
    assert items["draft model"] == both.plan.demand.draft_bytes > 0
    assert both.plan.planned_bytes <= both.plan.budget_bytes
    assert any("draft model llama.gguf" in note for note in both.notes)
    planned = edgelm.plan(files["llama"], memory=GB, backend="numpy", threads=1, context=128, draft=files["llama"])
    assert dict(planned.items())["draft model"] == items["draft model"]


def test_the_draft_is_dropped_where_the_budget_holds_only_one(files: dict[str, Path]) -> None:
    with load(files["llama"], memory=floor_of(files["llama"]) + 4_000_000, draft=files["large"]) as model:
        assert model.plan.demand.draft_bytes == 0
        assert any("the draft model was dropped" in note for note in model.notes)
        assert answer(model)[1].completion_tokens == 60


def test_a_smaller_budget_drops_the_draft_in_the_middle_of_an_answer(
    files: dict[str, Path], both: edgelm.Model
) -> None:
    expected, _ = answer(both)
    found = []
    for chunk in both.stream_ids(IDS, max_tokens=60, ignore_eos=True):
        if chunk.token_id is not None:
            found.append(chunk.token_id)
        if len(found) == 20:
            with pytest.raises(BudgetTooSmall) as refused:
                both.set_budget(1)
            both.set_budget(refused.value.needed_bytes)
    assert found == expected
    assert both.plan.demand.draft_bytes == 0
    assert any("dropped" in note for note in both.notes)


def test_other_vocabularies_are_refused(files: dict[str, Path]) -> None:
    with pytest.raises(ConfigError, match=r"cannot draft for llama\.gguf: their vocabularies are not the same"):
        load(files["llama"], draft=files["other"])


def test_a_draft_can_be_cancelled_and_left_out_of_an_answer(both: edgelm.Model) -> None:
    stream = both.stream_ids(IDS, max_tokens=60, ignore_eos=True)
    next(stream)
    both.cancel()
    assert list(stream)[-1].finish_reason == "cancelled"
    expected, usage = answer(both, speculate=False)
    assert usage.drafted_tokens == 0
    assert answer(both)[0] == expected


def test_a_low_bit_copy_is_found_and_drafts(files: dict[str, Path]) -> None:
    with load(files["llama"], draft="auto") as model:
        assert any("there is no low-bit copy of llama.gguf" in note for note in model.notes)
        assert model.plan.demand.draft_bytes == 0
        expected, _ = answer(model, speculate=False)
    edgelm.draft_copy(files["llama"])
    with load(files["llama"], draft="auto") as model:
        assert any("draft model" in note and "resident" in note for note in model.notes)
        found, usage = answer(model)
    assert found == expected
    assert usage.drafted_tokens > 0


def test_a_draft_that_would_cost_more_reads_than_it_saves_passes_is_dropped(
    files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of the budget for a draft as large as the model: far more is read, and wide passes are not free."""
    monkeypatch.setattr(opening, "measured_rates", lambda *_, **__: Rates(1e9, 1e7, wide_bytes_per_s=1e7))
    options = {"memory": floor_of(files["large"]) + 20_000_000, "spill": False}
    with load(files["large"], **options) as model:
        assert model.plan.streamed
    with load(files["large"], draft=files["llama"], **options) as model:
        assert model.plan.demand.draft_bytes == 0
        assert any("it would slow the model down" in note for note in model.notes)


def test_reads_for_the_next_pass_go_on_while_the_draft_guesses(files: dict[str, Path]) -> None:
    with load(files["large"], memory=floor_of(files["large"]) + 16_000_000, draft=files["llama"]) as model:
        assert model.plan.streamed
        assert model._draft is not None
        engine, step, idle = model._engine, model._draft.forward, []

        def watched(*given: Any, **named: Any) -> Any:
            began = time.perf_counter()
            while len(engine.window._ahead) < engine.plan.n_slots and time.perf_counter() - began < 5:
                time.sleep(0.001)
            idle.append(len(engine.window._ahead) < engine.plan.n_slots)
            return step(*given, **named)

        model._draft.forward = watched  # type: ignore[method-assign]
        assert len(list(model.stream_ids(IDS, max_tokens=12, ignore_eos=True))) > 12
    assert idle
    assert not any(idle)


def test_beside_a_backend_of_prompts_a_draft_counts_too(files: dict[str, Path]) -> None:
    with load(files["llama"], backend="npu+numpy", draft=files["llama"]) as model:
        assert dict(model.plan.items())["draft model"] == model.plan.demand.draft_bytes > 0
        assert model.plan.planned_bytes <= model.plan.budget_bytes
        assert answer(model)[1].drafted_tokens > 0


def test_where_nothing_is_guessed_a_draft_takes_no_memory(files: dict[str, Path]) -> None:
    with load(files["llama"], speculate=False, draft=files["llama"]) as model:
        assert model.plan.demand.draft_bytes == 0
        assert any("the draft model is left out" in note for note in model.notes)
        assert answer(model)[1].passes == 59
