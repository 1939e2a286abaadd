"""Answers side by side: the prompt once, the weights once for all, and each answer what it would be alone."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engines import need, opened, prepared_as, prepared_at, shrink

import edgelm
from edgelm.engine.forward import Engine
from edgelm.engine.generate import Conversation
from edgelm.engine.loading import Request, build, replan
from edgelm.engine.logprobs import Watched
from edgelm.engine.samples import answers, longest
from edgelm.engine.sampling import Sampling, make_sampler
from edgelm.errors import BudgetTooSmall, ConfigError, ContextOverflow
from edgelm.memory.arena import KVArena, LayerCache
from edgelm.memory.cache_layout import CacheLayout
from edgelm.memory.claims import SideBySide
from edgelm.memory.derived import derived
from edgelm.memory.stores import MemoryStore
from edgelm.sizes import GB
from edgelm.testing import tiny_model

IDS = np.random.default_rng(6).integers(3, 250, 40).tolist()
N = 4


pytestmark = pytest.mark.usefixtures("known_rates")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {name: tiny_model(folder / f"{name}.gguf", name, n_vocab=384) for name in ("llama", "gemma3")}


def load(path: Path, **options: Any) -> edgelm.Model:
    return edgelm.load(path, **{"memory": GB, "backend": "numpy", "threads": 1, "context": 256, **options})


@pytest.fixture
def tiny_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    shrink(monkeypatch)


@contextmanager
def engine_for(path: Path, budget_bytes: int, parallel: int, context: int = 256) -> Iterator[Engine]:
    """Open an engine with room for so many answers, and no rows for drafts."""
    request = Request(budget_bytes, context, 1, speculate=False, parallel=parallel)
    with opened(prepared_as(path, request)) as engine:
        yield engine


def budgets_of(path: Path, parallel: int, context: int = 256) -> tuple[int, int]:
    """Return the smallest budget that works, and the smallest with which all weights stay."""
    with pytest.raises(BudgetTooSmall) as caught, engine_for(path, 1, parallel, context):
        pass
    with engine_for(path, GB, parallel, context) as engine:
        return caught.value.needed_bytes, engine.plan.planned_bytes


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
@pytest.mark.parametrize("options", [{"temperature": 0.9, "seed": 5}, {"temperature": 1.4, "seed": 8, "top_k": 0}])
def test_each_answer_is_what_it_would_be_alone(
    models: dict[str, Path], architecture: str, options: dict[str, Any]
) -> None:
    """With windows of sixteen that are crossed."""
    with load(models[architecture]) as model:
        found = model.samples_of(IDS, N, max_tokens=24, ignore_eos=True, **options)
        assert [one.mean_logprob for one in found] == sorted((one.mean_logprob for one in found), reverse=True)
        for one in found:
            assert one.seed is not None
            alone = options | {"seed": one.seed}
            chunks = list(model.stream_ids(IDS, max_tokens=24, ignore_eos=True, speculate=False, logprobs=0, **alone))
            assert one.token_ids == tuple(chunk.token_id for chunk in chunks[:-1])
            mean = np.mean([chunk.logprobs.logprob for chunk in chunks if chunk.logprobs])
            assert one.mean_logprob == pytest.approx(mean, abs=1e-2)
            assert one.finish_reason == "length"


@pytest.mark.parametrize("backend", ["llamacpp", "onnx", "mlx"])
def test_every_backend_keeps_answers_apart(models: dict[str, Path], backend: str) -> None:
    with load(models["llama"], backend=need(backend)) as model:
        found = model.samples_of(IDS, N, max_tokens=6, ignore_eos=True)
        assert len({one.token_ids for one in found}) == 1  # greedy: all the same
        expected = [chunk.token_id for chunk in model.stream_ids(IDS, max_tokens=6, ignore_eos=True, speculate=False)]
        assert list(found[0].token_ids[:3]) == expected[:3]


def test_the_prompt_is_computed_once_and_a_pass_serves_all(models: dict[str, Path]) -> None:
    with load(models["llama"]) as model:
        widths = spied(model)
        model.samples_of(IDS, N, max_tokens=10, ignore_eos=True, temperature=1.0, seed=1)
        assert widths == [len(IDS), *[N] * 9]
        assert model._engine.n_past == len(IDS)
        widths.clear()
        model.samples_of(IDS, 2, max_tokens=3, ignore_eos=True)
        assert widths == [1, 2, 2]  # only the last token of the prompt, for its logits


def test_answers_end_by_themselves_and_stops_are_kept(models: dict[str, Path]) -> None:
    with load(models["llama"]) as model:
        greedy = [c.token_id for c in model.stream_ids(IDS, max_tokens=8, ignore_eos=True) if c.token_id is not None]
        model.tokenizer.eos_ids |= {greedy[4]}
        (one, other) = model.samples_of(IDS, 2, max_tokens=30)
        assert list(one.token_ids) == greedy[: greedy.index(greedy[4])]
        assert (one.finish_reason, other.finish_reason) == ("stop", "stop")
        text = model.chat().samples("the cat", 2, max_tokens=12)
        assert len(text) == 2


def test_what_there_is_no_room_for_is_a_sentence(models: dict[str, Path]) -> None:
    with load(models["llama"], context=64) as model:
        with pytest.raises(ConfigError, match="17 answers side by side are more than the 16"):
            model.samples_of(IDS, 17)
        with pytest.raises(ContextOverflow):
            model.samples_of(IDS * 2, 4)
        with pytest.raises(ConfigError, match="at least 1"):
            model.samples_of(IDS, 0)
        found = model.samples_of(IDS, 4, ignore_eos=True)
        assert sum(len(one.token_ids) for one in found) <= 64 - len(IDS) + 4
    with load(models["llama"], speculate=False) as model, pytest.raises(ConfigError, match="more than the 1"):
        model.samples_of(IDS, 2)


def test_an_answer_that_ended_takes_no_row_any_more(models: dict[str, Path]) -> None:
    with load(models["llama"]) as model:
        widths = spied(model)
        found = model.samples_of(IDS, N, max_tokens=50, temperature=2.0, seed=3, stop=["e"])
        drawn = sorted((len(one.token_ids) for one in found), reverse=True)
        assert widths[1:] == [sum(n > step for n in drawn) for step in range(1, drawn[0])]
        assert len(set(widths[1:])) > 1
        for one in found:
            assert "e" not in one.text
            alone = list(
                model.stream_ids(IDS, max_tokens=50, temperature=2.0, seed=one.seed, stop=["e"], speculate=False)
            )
            assert one.text == "".join(chunk.text for chunk in alone)
            assert one.finish_reason == alone[-1].finish_reason


def spied(model: edgelm.Model) -> list[int]:
    """Return the list to which the width of every pass is added."""
    widths: list[int] = []
    run = model._engine._pass  # type: ignore[attr-defined]

    def counted(ids: Any, *args: Any, **rest: Any) -> None:
        widths.append(len(ids))
        run(ids, *args, **rest)

    model._engine._pass = counted  # type: ignore[attr-defined]
    return widths


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_a_step_reads_what_a_step_of_one_reads(models: dict[str, Path], architecture: str, tiny_plans: None) -> None:
    """Flash bytes for each pass do not grow with N; places of the cache do by the tokens of the answers only."""
    path, read = models[architecture], []
    for n in (1, N):
        low, high = budgets_of(path, n)
        with engine_for(path, (low + high) // 2, n) as engine:
            assert engine.plan.planned_bytes <= (low + high) // 2
            assert engine.max_rows == n
            conversation = Conversation(engine)
            conversation.prefill(IDS)
            before, places = engine.bytes_streamed, spied_places(engine)
            samplers = [Watched(make_sampler(Sampling(temperature=1.0, seed=i)), 0) for i in range(n)]
            found = answers(conversation, IDS, samplers, 20, (), lambda: None, lambda i, token: False)
            assert [len(one.ids) for one in found] == [20] * n
            assert max(places) == len(IDS) + n * 19
            read.append(engine.bytes_streamed - before)
            a_pass, slots = engine.plan.streamed_bytes, engine.plan.slots_bytes
            assert a_pass > 0
            assert abs(read[-1] - 19 * a_pass) <= slots  # but for what was, and is, read ahead
    assert abs(read[1] - read[0]) <= 0.1 * read[0]


def spied_places(engine: Engine) -> list[int]:
    """Return the list to which the tokens in the cache are added after every pass."""
    stored: list[int] = []
    advance = engine.arena.advance

    def advanced(n_tokens: int) -> None:
        advance(n_tokens)
        stored.append(engine.arena.n_past)

    engine.arena.advance = advanced  # type: ignore[method-assign]
    return stored


@pytest.mark.parametrize("budget_share", [0.0, 0.5, 1.0])
def test_windows_of_every_answer_have_room(models: dict[str, Path], tiny_plans: None, budget_share: float) -> None:
    """Rings of sixteen and prompt passes of sixteen: without room of their own, answers would overwrite each other."""
    path = models["gemma3"]
    with load(path, context=256) as model:
        with pytest.raises(ConfigError, match=r"sliding windows .* parallel=4, or ask for max_tokens up to \d$"):
            model.samples_of(IDS, N, max_tokens=48)
        assert len(model.samples_of(IDS, N, max_tokens=4)) == N
        options = {"max_tokens": 48, "ignore_eos": True, "temperature": 1.0, "speculate": False}
        alone = [
            tuple(c.token_id for c in model.stream_ids(IDS, seed=seed, **options) if c.token_id is not None)
            for seed in range(N)
        ]
    low, high = budgets_of(path, N, 256)
    with engine_for(path, int(low + (high - low) * budget_share), N, 256) as engine:
        assert min(engine.arena.most_places(group) for group in engine.arena.windows) == 16 * N + 32
        conversation = Conversation(engine)
        for _ in range(2):
            conversation.prefill(IDS)
            samplers = [Watched(make_sampler(Sampling(temperature=1.0, seed=i)), 0) for i in range(N)]
            most = longest(engine, len(IDS), N, 48)
            found = answers(conversation, IDS, samplers, most, (), lambda: None, lambda i, token: False)
            assert [tuple(one.ids) for one in found] == alone


def test_another_budget_in_between_changes_no_answer(models: dict[str, Path], tiny_plans: None) -> None:
    """With fewer rows than answers, their tokens take several passes."""
    path = models["llama"]
    low, high = budgets_of(path, 1)
    plain, _ = with_changes(path, ())
    changed, rows = with_changes(path, (low, high, low))
    assert plain == changed
    assert min(rows) == 1 < N <= max(rows)


def with_changes(path: Path, budgets: Sequence[int]) -> tuple[list[list[int]], list[int]]:
    """Return answers during which the budget changes every five passes, and the rows of a pass that it had room for."""
    prepared = prepared_at(path, GB, speculate=True, context=256)
    engine = build(prepared, derived(MemoryStore([path.read_bytes()]), prepared.file))
    conversation, steps, rows = Conversation(engine), count(1), [engine.max_rows]
    conversation.prefill(IDS)

    def breathe() -> None:
        number, rest = divmod(next(steps), 5)
        if not rest and number <= len(budgets):
            engine.carry_out(replan(prepared, engine, budgets[number - 1]))
            rows.append(engine.max_rows)

    samplers = [Watched(make_sampler(Sampling(temperature=1.0, seed=i)), 0) for i in range(N)]
    try:
        found = answers(conversation, IDS, samplers, 24, (), breathe, lambda i, token: False)
    finally:
        engine.close()
    return [one.ids for one in found], rows


def test_answers_that_are_broken_off_keep_what_they_have(models: dict[str, Path]) -> None:
    with load(models["llama"]) as model:
        seen: list[int] = []

        def processor(history: Any, logits: Any) -> Any:
            seen.append(len(history))
            if len(seen) == 10:
                model.cancel()
            return logits

        found = model.samples_of(IDS, N, max_tokens=20, ignore_eos=True, processors=[processor])
        assert {one.finish_reason for one in found} == {"cancelled"}
        assert sorted(len(one.token_ids) for one in found) == [3, 3, 3, 3]
        assert {
            one.finish_reason for one in model.samples_of(IDS, 2, timeout_s=1e-6, max_tokens=200, ignore_eos=True)
        } == {"timeout"}
        assert model.samples_of(IDS, 2, max_tokens=2, ignore_eos=True)[0].finish_reason == "length"


def test_the_best_of_some_by_a_verifier(models: dict[str, Path]) -> None:
    """A verifier that likes many letters finds more in the best of four than in one."""
    with load(models["llama"]) as model:

        def verifier(one: edgelm.Sample) -> int:
            return len(set(one.text))

        best, single = 0, 0
        for seed in range(0, 40, N):
            options: dict[str, Any] = {"max_tokens": 10, "temperature": 1.5, "seed": seed, "ignore_eos": True}
            found = model.samples_of(IDS, N, **options)
            assert sum(len(one.token_ids) for one in found) <= N * 10  # the budget of tokens
            best += verifier(max(found, key=verifier))
            single += verifier(next(one for one in found if one.seed == seed))
        assert best > single


def test_answers_have_a_form(models: dict[str, Path]) -> None:
    pytest.importorskip("llguidance")
    with load(models["llama"]) as model:
        found = model.samples_of(IDS, 3, regex="[a-c]{2,6}", temperature=1.5, seed=4, max_tokens=20)
        assert all(re.fullmatch("[a-c]{2,6}", one.text) for one in found)
        (alone,) = model.samples_of(IDS, 1, regex="[a-c]{2,6}", temperature=1.5, seed=4, max_tokens=20)
        (same,) = (one for one in found if one.seed == 4)
        assert (same.text, same.finish_reason) == (alone.text, alone.finish_reason)
        assert same.mean_logprob == pytest.approx(alone.mean_logprob, abs=1e-3)


@pytest.mark.parametrize("seed", range(8))
def test_no_answer_sees_another(seed: int) -> None:
    """Masks of random rounds, with answers that end and passes that are cut, against the tokens written out."""
    rng = np.random.default_rng(seed)
    n, window, chunk, n_prompt = int(rng.integers(2, 6)), int(rng.integers(3, 12)), 32, int(rng.integers(1, 60))
    arena = KVArena([LayerCache(0, 0, 1, 1, 1), LayerCache(1, window, 1, 1, 1)], 512, chunk, CacheLayout(windows=n))
    written: dict[int, dict[int, tuple[int, int]]] = {0: {}, 1: {}}
    for first in range(0, n_prompt, chunk):
        width = min(chunk, n_prompt - first)
        for group in written:
            places, mask = np.empty(width, np.int64), np.empty((width, arena.length(group, width)), np.float32)
            arena.claim(group, width, places, mask)
            written[group].update({int(place): (-1, first + i) for i, place in enumerate(places)})
        arena.advance(width)
    claim, active, lengths = SideBySide(arena, n), list(range(n)), [0] * n
    while active and arena.n_past + len(active) <= arena.context:
        cut = int(rng.integers(1, len(active) + 1))
        for rows in filter(None, (active[:cut], active[cut:])):
            claim.take(rows)
            assert claim.positions(arena.n_past).tolist() == [n_prompt + lengths[row] for row in rows]
            arena.grow(len(rows))
            for group, wide in ((0, 10**6), (1, window)):
                places = np.empty(len(rows), np.int64)
                mask = np.empty((len(rows), arena.length(group, len(rows))), np.float32)
                claim.place(arena, group, places, mask)
                for place, row in zip(places.tolist(), rows, strict=True):
                    written[group][place] = (row, n_prompt + lengths[row])
                for row, visible in zip(rows, mask == 0, strict=True):
                    last = n_prompt + lengths[row]
                    seen = sorted(written[group][place] for place in np.flatnonzero(visible).tolist())
                    first = max(last - wide + 1, 0)
                    expected = [(-1, i) for i in range(first, n_prompt)]
                    assert seen == expected + [(row, i) for i in range(max(first, n_prompt), last + 1)]
            arena.advance(len(rows))
            claim.passed()
            for row in rows:
                lengths[row] += 1
        if rng.random() < 0.01:
            active.remove(int(rng.choice(active)))
    assert max(lengths) > 20
