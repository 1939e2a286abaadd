"""Bounded caches: exact while everything has room, never larger than planned, and chosen by what is looked for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import engines
import numpy as np
import pytest
from engines import BACKENDS, NOISE, engine_at, need, prepared_as, shrink

import edgelm
from edgelm.engine import important
from edgelm.engine.filtering import ANSWER_TOKENS, FIRST, LAST
from edgelm.engine.generate import Conversation
from edgelm.engine.important import ImportantEngine
from edgelm.engine.loading import Prepared, Request, replan
from edgelm.errors import BudgetTooSmall, Cancelled, ConfigError
from edgelm.memory.bounded import bounded_bytes
from edgelm.sizes import GB
from edgelm.testing import tiny_model

CONTEXT, N_PROMPT = 1280, 900
IDS = np.random.default_rng(7).integers(3, 250, CONTEXT).tolist()


@pytest.fixture(autouse=True)
def _small_plans(monkeypatch: pytest.MonkeyPatch, known_rates: None) -> None:
    shrink(monkeypatch)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {name: tiny_model(folder / f"{name}.gguf", name, n_vocab=384) for name in ("llama", "gemma3", "gemma2")}


def prepared_at(path: Path, budget_bytes: int, backend: str = "numpy", kept: float = 0.25) -> Prepared:
    request = Request(budget_bytes, CONTEXT, 1, speculate=False, attention="important", kept=kept)
    return prepared_as(path, request, need(backend))


@contextmanager
def opened(prepared: Prepared) -> Iterator[ImportantEngine]:
    with engines.opened(prepared) as engine:
        assert isinstance(engine, ImportantEngine)
        yield engine


def answer(conversation: Conversation, n_prompt: int, n: int) -> list[np.ndarray]:
    """Return the logits behind a prompt and behind each of `n` tokens."""
    conversation.prefill(IDS[:n_prompt])
    found = [conversation.logits.copy()]
    for token in IDS[n_prompt : n_prompt + n]:
        conversation.step(token)
        found.append(conversation.logits.copy())
    return found


@pytest.mark.parametrize(
    ("architecture", "backend"),
    [*(("llama", one) for one in BACKENDS), ("gemma3", "numpy"), ("gemma2", "llamacpp")],
)
def test_what_has_room_is_exact(models: dict[str, Path], architecture: str, backend: str) -> None:
    """A prompt that fits, one that was on flash and is kept whole, and the answers behind them."""
    path = models[architecture]
    for n_prompt, kept in ((300, 0.25), (N_PROMPT, 0.75)):
        with engine_at(path, GB, backend=need(backend), context=CONTEXT) as engine:
            plain = answer(Conversation(engine), n_prompt, 20)
        with opened(prepared_at(path, GB, backend, kept)) as engine:
            bounded = answer(Conversation(engine), n_prompt, 20)
            assert engine.spilled.places == [n_prompt + 20] * len(engine.spilled.layers)
        for a, b in zip(plain, bounded, strict=True):
            assert np.abs(a - b).max() < NOISE[backend]


def test_layers_never_hold_more_than_was_planned(models: dict[str, Path]) -> None:
    """Also where the answer is longer than its room: the layers choose again."""
    previous = [0]
    for kept in (0.05, 0.25, 0.5):
        prepared = prepared_at(models["llama"], GB, kept=kept)
        demand, n_kept = prepared.plan.demand, max(round(kept * CONTEXT), FIRST + LAST)
        assert demand.n_kept == n_kept
        with opened(prepared) as engine:
            conversation = Conversation(engine)
            conversation.prefill(IDS[:N_PROMPT])
            places, layers = engine.spilled.places, [layer for _, layer in engine.spilled.cache.shape.layers]
            assert n_kept * len(places) - len(places) <= sum(places) <= n_kept * len(places)
            assert all(a <= b for a, b in zip(previous * len(places) if len(previous) == 1 else previous, places,
                                              strict=True))  # fmt: skip
            for token in IDS[: ANSWER_TOKENS + 60]:
                conversation.step(token)
                assert all(b <= a + ANSWER_TOKENS for a, b in zip(places, engine.spilled.places, strict=True))
            assert engine.n_past == N_PROMPT + ANSWER_TOKENS + 60
            sizes = [size + ANSWER_TOKENS for size in places]
            assert sum(map(bounded_bytes, layers, sizes)) <= demand.kv_bytes
            previous = places


def test_a_budget_changes_nothing_else(models: dict[str, Path]) -> None:
    path = models["llama"]
    with pytest.raises(BudgetTooSmall) as caught:
        prepared_at(path, 1)
    found = []
    for budget in (caught.value.needed_bytes, GB):
        prepared = prepared_at(path, budget)
        with opened(prepared) as engine:
            assert bool(engine.plan.streamed) == (budget != GB)
            assert engine.plan.planned_bytes <= budget
            again = replan(prepared, engine, GB).demand
            assert again.kv_bytes - engine.plan.demand.kv_bytes in (0, 1)  # an empty arena has a byte
            found.append(answer(Conversation(engine), N_PROMPT, 8))
            traffic = engine.kv_traffic
            assert traffic.written_bytes > 0
            engine.forward(IDS[:1])
            assert engine.kv_traffic == traffic  # the answer reads nothing from flash
    assert all(np.array_equal(a, b) for a, b in zip(*found, strict=True))


def test_a_later_prompt_is_read_anew_and_a_broken_pass_leaves_no_trace(models: dict[str, Path]) -> None:
    with opened(prepared_at(models["gemma3"], GB)) as engine:
        conversation = Conversation(engine)
        first = answer(conversation, N_PROMPT, 8)
        before = engine.spilled.places
        engine.cancel()
        with pytest.raises(Cancelled):
            conversation.step(3)
        engine.cancel(on=False)
        conversation.step(IDS[N_PROMPT + 8])
        assert engine.spilled.places == [n + 1 for n in before]
        assert conversation.prefill(IDS[: N_PROMPT + 20]) == N_PROMPT + 20
        again = answer(conversation, N_PROMPT, 8)
        assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))


def test_what_the_end_of_a_prompt_looks_for_is_kept(models: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """The keys that are kept are those of the places that rank highest, in every layer."""
    wanted = 333

    def ranked(queries: np.ndarray, keys: np.ndarray, spec: Any) -> np.ndarray:
        assert len(queries) == LAST
        return np.where(np.arange(len(keys)) == wanted, 1.0, 1e-3 / (1 + np.arange(len(keys)))).astype(np.float32)

    monkeypatch.setattr(important, "ranked", ranked)
    with engine_at(models["llama"], GB, context=CONTEXT) as engine:
        engine.forward(IDS[:N_PROMPT])
        expected = [engine.arena.export(layer, wanted, 1)[0][0] for layer in range(3)]
    with opened(prepared_at(models["llama"], GB, kept=0.1)) as engine:
        Conversation(engine).prefill(IDS[:N_PROMPT])
        for layer, key in enumerate(expected):
            keys = engine.spilled._bounded[layer].keys.transpose(1, 0, 2).astype(np.float32)
            assert np.abs(keys - key).max(axis=(1, 2)).min() < 5e-3


def load(path: Path, **options: Any) -> edgelm.Model:
    return edgelm.load(path, **{"memory": 2 * GB, "backend": "numpy", "threads": 1, "context": 512, **options})


def test_answers_say_that_they_are_approximate(models: dict[str, Path], tmp_path: Path) -> None:
    def ids(model: edgelm.Model, n: int) -> list[int | None]:
        return [one.token_id for one in model.stream_ids(IDS[:n], max_tokens=20, ignore_eos=True)]

    with load(models["llama"]) as model:
        exact = ids(model, 400)
    with load(models["llama"], attention="important", kept=1.0) as model:
        assert ids(model, 400) == exact
        assert model.plan.approximate is None
    with load(models["llama"], attention="important") as model:
        said = "important attention: of a longer prompt 128 tokens are kept of each layer, on average"
        assert model.plan.approximate == said
        assert f"answers are approximate: {said}" in model.notes
        assert ids(model, 400) == ids(model, 400)
        last = list(model.stream_ids(IDS[:200], ignore_eos=True))[-1]
        assert (last.finish_reason, last.usage.completion_tokens) == ("length", 512 - 200 + 1)
        assert last.usage.approximate == said
        assert len(model.score_ids(IDS[:420], 400).logprobs) == 20
        with pytest.raises(ConfigError, match="not the whole conversation"):
            model.save_cache(tmp_path / "cache")
        with pytest.raises(ConfigError, match="one answer at a time"):
            model.samples_of(IDS[:40], 2)
