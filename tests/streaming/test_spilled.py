"""Caches that do not fit: the oldest keys and values on flash, the same bits wherever they lie."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from engines import BACKENDS, NOISE, engine_at, in_layout, need, opened, shrink

from edgelm.engine import demand, loading
from edgelm.engine.backend import Adopting
from edgelm.engine.demand import Demands
from edgelm.engine.forward import Engine
from edgelm.engine.loading import Prepared, Request, build, open_path, prepare, replan
from edgelm.engine.registry import get_backend
from edgelm.engine.spilling import spilling_of
from edgelm.errors import BudgetTooSmall, Cancelled
from edgelm.memory.spill_shape import PLACES
from edgelm.memory.stores import MemoryStore, ThrottledStore
from edgelm.sizes import GB
from edgelm.testing import tiny_model
from edgelm.text.tokenizer import load_tokenizer

CONTEXT, N_PROMPT = 1280, 1100
IDS = np.random.default_rng(3).integers(3, 250, CONTEXT).tolist()


@pytest.fixture(autouse=True)
def _small_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    shrink(monkeypatch)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {name: tiny_model(folder / f"{name}.gguf", name, n_vocab=384) for name in ("llama", "gemma2", "gemma3")}


def prepared_to_spill(
    path: Path,
    *,
    backend: str = "numpy",
    extra: int = 0,
    more_bytes: int = GB,
    n_threads: int = 1,
    n_rows: int = 1,
    context: int = CONTEXT,
) -> Prepared:
    """Return a plan whose layers may spill, `extra` blocks kept beside the least, with `more_bytes` than the floor."""
    chosen = get_backend(need(backend))
    session = chosen.open(n_threads)
    request = Request(GB, context, n_threads, speculate=False)
    prepared = prepare(in_layout(path, chosen), chosen, session, request, 0, None)
    model, spilling = spilling_of(prepared.model, n_threads) or (None, None)
    assert model is not None
    assert spilling is not None
    spilling = spilling._replace(extra=extra)
    demands = Demands(model, session, context, 0, 1, prepared.cache, n_rows=n_rows, spilling=spilling)
    terms = loading.Terms(context, None, prepared.streams, isinstance(session, Adopting))
    with pytest.raises(BudgetTooSmall) as caught:
        loading.settle(model, demands, 1, terms)
    plan = loading.settle(model, demands, caught.value.needed_bytes + more_bytes, terms)
    return prepared._replace(model=model, plan=plan, spilling=spilling)


def talk(engine: Engine) -> list[np.ndarray]:
    """Return logits after a long prompt, single tokens, a step back, and a short prompt."""
    found = [engine.forward(IDS[:N_PROMPT])[-1].copy()]
    found += [engine.forward([token])[-1].copy() for token in IDS[N_PROMPT : N_PROMPT + 6]]
    kept = engine.truncate(PLACES + 40)
    found.append(engine.forward(IDS[kept : PLACES + 300])[-1].copy())
    engine.truncate(0)
    found.append(engine.forward(IDS[:100])[-1].copy())
    return found


@pytest.mark.parametrize(
    ("architecture", "backend"),
    [
        *(("llama", backend) for backend in BACKENDS),
        ("gemma2", "llamacpp"),
        ("gemma3", "llamacpp"),
        ("gemma3", "numpy"),
    ],
)
def test_the_same_bits_wherever_blocks_lie(models: dict[str, Path], architecture: str, backend: str) -> None:
    """With room for all, with a part on flash and weights streamed, and with two lanes."""
    path = models[architecture]
    with engine_at(path, GB, backend=need(backend), context=CONTEXT) as engine:
        plain = talk(engine)
    with opened(prepared_to_spill(path, backend=backend, extra=9)) as engine:
        roomy = talk(engine)
        assert engine.kv_traffic == (0, 0)
    for how in ({"more_bytes": 0}, {"extra": 1, "more_bytes": 50_000, "n_threads": 2}):
        with opened(prepared_to_spill(path, backend=backend, **how)) as engine:
            spilled = talk(engine)
            assert engine.plan.streamed
            traffic = engine.kv_traffic
            assert traffic.written_bytes > 0
            assert traffic.read_bytes > 6 * engine.plan.demand.spilled_bytes // 2
        for a, b, c in zip(roomy, spilled, plain, strict=True):
            assert np.array_equal(a, b)
            assert np.abs(a - c).max() < NOISE[backend]


def test_a_pass_that_is_cancelled_leaves_the_cache_as_it_was(models: dict[str, Path]) -> None:
    with opened(prepared_to_spill(models["llama"])) as engine:
        expected = [engine.forward(IDS[:N_PROMPT])[-1].copy(), engine.forward([7])[-1].copy()]
        engine.truncate(N_PROMPT)
        spilled, inner = engine.spilled, engine.spilled.attend  # type: ignore[union-attr]
        assert spilled is not None

        def stop(layer: int, *rest: object) -> None:
            if layer == 1:
                threading.Thread(target=engine.cancel).start()
                while not spilled._lanes.aborted:
                    pass
            inner(layer, *rest)  # type: ignore[arg-type]

        spilled.attend = stop  # type: ignore[method-assign,assignment]
        with pytest.raises(Cancelled):
            engine.forward([9])
        engine.cancel(False)
        spilled.attend = inner  # type: ignore[method-assign]
        assert engine.n_past == N_PROMPT
        assert np.array_equal(engine.forward([7])[-1], expected[1])
        engine.truncate(0)
        assert np.array_equal(engine.forward(IDS[:N_PROMPT])[-1], expected[0])


@pytest.mark.parametrize("backend", ["numpy", "llamacpp"])
def test_drafts_form_a_chain_and_what_is_not_kept_is_forgotten(models: dict[str, Path], backend: str) -> None:
    """The drafts begin in one block and end in the next, which pushes another one out of memory."""
    n_prompt, drafted = 4 * PLACES - 2, IDS[-4:]
    with opened(prepared_to_spill(models["llama"], backend=backend, n_rows=4)) as engine:
        assert engine.max_rows == 4
        assert not engine.trees
        engine.forward(IDS[:n_prompt])
        one_by_one = [engine.forward([token])[-1].copy() for token in drafted]
        engine.truncate(n_prompt)
        rows = engine.verify(drafted, (-1, 0, 1, 2))
        for i, expected in enumerate(one_by_one):
            assert np.abs(rows[i] - expected).max() < NOISE[backend]
        engine.keep((0, 1))
        assert engine.n_past == n_prompt + 2
        assert np.abs(engine.forward([drafted[2]])[-1] - one_by_one[2]).max() < NOISE[backend]
        with pytest.raises(ValueError, match="kept elsewhere"):
            engine.arena.export(0, 0, 1)


def test_another_budget_keeps_the_cache(models: dict[str, Path]) -> None:
    prepared = prepared_to_spill(models["llama"])
    with opened(prepared) as engine:
        engine.forward(IDS[:N_PROMPT])
        expected = engine.forward([5])[-1].copy()
        with pytest.raises(BudgetTooSmall) as caught:
            replan(prepared, engine, 1)
        engine.carry_out(replan(prepared, engine, caught.value.needed_bytes))
        assert engine.plan.streamed
        assert engine.plan.demand.spill == prepared.plan.demand.spill
        engine.truncate(N_PROMPT)
        assert np.array_equal(engine.forward([5])[-1], expected)


def test_spills_only_where_the_context_that_was_asked_for_fits_in_no_other_way(models: dict[str, Path]) -> None:
    chosen, context = get_backend("numpy"), 65_536
    session = chosen.open(1)

    def plan_of(budget_bytes: int, *, spill: bool, asked: int | None = context) -> Prepared:
        request = Request(budget_bytes, asked, 1, speculate=False, spill=spill)
        return prepare(in_layout(models["llama"], chosen), chosen, session, request, 0, None)

    with pytest.raises(BudgetTooSmall) as plain:
        plan_of(1, spill=False)
    with pytest.raises(BudgetTooSmall) as spilling:
        plan_of(1, spill=True)
    least, floor = spilling.value.needed_bytes, plain.value.needed_bytes
    assert least < floor
    assert plan_of(floor, spill=True).spilling is None
    with pytest.raises(BudgetTooSmall) as refused:
        plan_of(floor - 1, spill=False)
    assert refused.value.needed_bytes == floor
    whole = None
    for budget in (least, least + 8_000_000, least + 16_000_000, floor - 1):
        prepared = plan_of(budget, spill=True)
        demand = prepared.plan.demand
        assert prepared.plan.planned_bytes <= budget
        assert demand.spill is not None
        assert demand.spill.file_bytes + demand.spill.memory_bytes == 256 * demand.spill.step_bytes
        assert prepared.plan.as_dict()["kv_spilled_bytes"] == demand.spilled_bytes
        said = f"{demand.spill.resident} tokens stay in memory" in str(prepared.plan)
        assert said == (demand.spilled_bytes > 0)
        assert whole is None or demand.spilled_bytes <= whole
        whole = demand.spilled_bytes
        # what weights leave unused holds keys and values
        spare = budget - prepared.plan.planned_bytes
        assert prepared.plan.streamed or not whole or spare < demand.spill.step_bytes
    session.close()


def test_reads_wait_for_the_same_simulated_flash(models: dict[str, Path]) -> None:
    prepared = prepared_to_spill(models["llama"], more_bytes=0)
    device = ThrottledStore(MemoryStore([part.read_bytes() for part in prepared.file.paths]), 1 * GB)
    engine = build(prepared, device, beside=device.beside)
    engine.forward(IDS[: 3 * PLACES])
    before = device._free_at[0]
    engine.forward([3])
    least_s = (engine.plan.streamed_bytes + 2 * engine.plan.demand.spill.step_bytes) / GB  # type: ignore[union-attr]
    assert device._free_at[0] - before > 0.99 * least_s
    engine.close()


@pytest.mark.models
@pytest.mark.slow
def test_a_real_model_answers_the_same_tokens(
    real_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A long text, a quarter of its keys and values in memory; `bench/long_prompt.py` has the full length."""
    monkeypatch.setattr(demand, "CHUNKS", (256,))
    path, context, n_tokens = real_model("smollm2-135m-instruct"), 2048, 32
    text = Path(__file__).parents[2].joinpath("bench/prompt.txt").read_text()
    ids = load_tokenizer(open_path(path)).encode(text * 20)[: context - n_tokens - 1]

    def answer(engine: Engine) -> list[int]:
        found = [int(engine.forward(ids)[-1].argmax())]
        while len(found) < n_tokens:
            found.append(int(engine.forward(found[-1:])[-1].argmax()))
        return found

    with engine_at(path, GB, backend=need("llamacpp"), context=context) as engine:
        expected = answer(engine)
    with opened(prepared_to_spill(path, backend="llamacpp", n_threads=2, context=context)) as engine:
        assert engine.plan.demand.spill is not None
        assert engine.plan.demand.spill.resident == context // 4
        assert answer(engine) == expected
