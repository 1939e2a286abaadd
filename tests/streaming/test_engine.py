"""The forward pass: streamed weights give the bits of resident ones, whatever is cut, cancelled or rolled back."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from engines import BACKENDS, CHUNK, budgets, engine_at, need, shrink
from numpy.typing import NDArray

from edgelm.engine.forward import Engine
from edgelm.engine.passes import first_width
from edgelm.errors import Cancelled, ConfigError, ContextOverflow
from edgelm.memory.stores import Store
from edgelm.sizes import GB
from edgelm.testing import ARCHITECTURES, tiny_model
from edgelm.testing.evaluate import evaluate

N_VOCAB = 384  # whole panels of 32 rows: ggml's float kernel sums the rest of a product in another order
IDS = np.random.default_rng(7).integers(3, 250, 48).tolist()
N_PROMPT = 40

Logits = NDArray[np.float32]


@pytest.fixture(autouse=True)
def _small_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    shrink(monkeypatch)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {name: tiny_model(folder / f"{name}.gguf", name, n_vocab=N_VOCAB) for name in ARCHITECTURES}


def walk(engine: Engine, ids: Sequence[int] = IDS, n_prompt: int = N_PROMPT) -> Logits:
    """Return the logits after the prompt and after every further token."""
    rows = [engine.forward(ids[:n_prompt])[-1].copy()]
    rows += [engine.forward([token])[-1].copy() for token in ids[n_prompt:]]
    return np.stack(rows)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_streamed_logits_have_the_bits_of_resident_ones(
    models: dict[str, Path], architecture: str, backend: str
) -> None:
    path = models[architecture]
    results, streamed = [], []
    for budget in budgets(path, backend=need(backend)):
        with engine_at(path, budget, backend=backend) as engine:
            streamed.append(engine.plan.streamed_bytes)
            assert engine.plan.chunk == CHUNK
            results.append(walk(engine))
    assert streamed[0] > streamed[2] > streamed[-1] == 0
    for result in results:
        assert np.array_equal(result, results[-1])


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gemma3"])
def test_chunks_and_rings_agree_with_one_pass_over_everything(models: dict[str, Path], architecture: str) -> None:
    """Forty-eight tokens in passes of sixteen and one, through sliding windows of sixteen."""
    path = models[architecture]
    expected = evaluate(path, IDS)[N_PROMPT - 1 :]
    with engine_at(path, budgets(path)[1]) as engine:
        assert np.abs(walk(engine) - expected).max() < 5e-3


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("n_tokens", [5, 16, 21, 37])
def test_several_rows_of_logits(models: dict[str, Path], backend: str, n_tokens: int) -> None:
    """The head of untied and tied models in tiles: rows are put together from the tiles."""
    for architecture in ("olmo2", "gemma2"):
        path = models[architecture]
        results = []
        for budget in budgets(path, 3, need(backend), max_outputs=5):
            with engine_at(path, budget, backend=backend, max_outputs=5) as engine:
                results.append(engine.forward(IDS[:n_tokens], 5).copy())
                assert engine.n_past == n_tokens
        assert results[0].shape == (5, N_VOCAB)
        assert all(np.array_equal(result, results[-1]) for result in results)
        expected = evaluate(path, IDS[:n_tokens], backend=backend)[-5:]
        assert np.abs(results[0] - expected).max() < 0.05


def test_rows_of_logits_share_a_pass_even_when_it_is_narrow(
    models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    shrink(monkeypatch, 8, 4, 1)
    path = models["llama"]
    with engine_at(path, budgets(path, max_outputs=4)[0], max_outputs=4) as engine:
        assert engine.plan.chunk == 4
        assert engine.forward(IDS[:6], 4).shape == (4, N_VOCAB)
        with pytest.raises(ValueError, match="at most 4"):
            engine.forward(IDS[:6], 5)
        with pytest.raises(ValueError, match="rows of logits of 2 tokens"):
            engine.forward(IDS[:2], 3)


def test_context_overflow_names_both_numbers_and_stores_nothing(models: dict[str, Path]) -> None:
    path = models["llama"]
    with engine_at(path, GB, context=32) as engine:
        engine.forward(IDS[:30])
        with pytest.raises(ContextOverflow) as caught:
            engine.forward(IDS[30:34])
        assert (caught.value.n_prompt_tokens, caught.value.n_context) == (34, 32)
        assert engine.n_past == 30
        engine.forward(IDS[30:32])
        assert engine.n_past == 32


@pytest.mark.parametrize("token", [-1, N_VOCAB])
def test_ids_outside_the_vocabulary_are_refused(models: dict[str, Path], token: int) -> None:
    path = models["llama"]
    with engine_at(path, GB) as engine:
        with pytest.raises(ConfigError, match=f"0…{N_VOCAB - 1}"):
            engine.forward([5, token])
        assert engine.n_past == 0


class CancellingStore:
    """Cancels the engine once, from the thread that reads, after as many reads as `countdown` says."""

    def __init__(self, inner: Store) -> None:
        self._inner, self.how = inner, inner.how
        self.engine: Engine | None = None
        self.countdown = -1

    def read_into(self, file: int, offset: int, n_bytes: int, buffer: memoryview, at: int) -> int:
        self.countdown -= 1
        if self.countdown == 0 and self.engine is not None:
            self.engine.cancel()
        return self._inner.read_into(file, offset, n_bytes, buffer, at)

    def close(self) -> None:
        self._inner.close()


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("n_reads", [1, 30, 47, 63])
def test_a_prompt_cancelled_by_another_thread_goes_on_correctly(
    models: dict[str, Path], architecture: str, backend: str, n_reads: int
) -> None:
    path = models[architecture]
    budget = budgets(path, backend=need(backend))[1]
    with engine_at(path, budget, backend=backend) as engine:
        expected = walk(engine)
    stores: list[CancellingStore] = []

    def wrap(store: Store) -> Store:
        stores.append(CancellingStore(store))
        return stores[0]

    with engine_at(path, budget, backend=backend, wrap=wrap) as engine:
        stores[0].engine, stores[0].countdown = engine, n_reads
        with pytest.raises(Cancelled):
            engine.forward(IDS[:N_PROMPT])
        assert engine.n_past % CHUNK == 0
        assert engine.n_past < N_PROMPT
        with pytest.raises(Cancelled):  # until it is taken back
            engine.forward(IDS[:4])
        engine.cancel(False)
        done = engine.n_past
        rows = [engine.forward(IDS[done:N_PROMPT])[-1].copy()]
        rows += [engine.forward([token])[-1].copy() for token in IDS[N_PROMPT:]]
        assert np.array_equal(np.stack(rows), expected)


def test_rolled_back_tokens_leave_no_trace(models: dict[str, Path]) -> None:
    for architecture in ("llama", "gemma3"):
        path = models[architecture]
        with engine_at(path, budgets(path)[2]) as engine:
            expected = walk(engine)
            engine.arena.truncate(0)
            engine.forward(IDS[:N_PROMPT])
            engine.forward([9, 9, 9])
            assert engine.arena.truncate(N_PROMPT) == N_PROMPT
            rows = [engine.forward([token])[-1].copy() for token in IDS[N_PROMPT:]]
            assert np.array_equal(np.stack(rows), expected[1:])


def widths(n: int, chunk: int, n_outputs: int = 1) -> list[int]:
    found: list[int] = []
    while (done := sum(found)) < n:
        found.append(first_width(n, done, chunk, n_outputs))
    return found


@pytest.mark.parametrize("chunk", [16, 32, 64, 128, 256, 512])
def test_no_pass_is_so_narrow_that_bits_would_change(chunk: int) -> None:
    for n in range(1, 1200):
        found = widths(n, chunk)
        assert sum(found) == n
        assert max(found) <= chunk
        assert all(width >= 8 for width in found[:-1])
        # what is left over of whole blocks is computed as llama.cpp does it
        assert found[-1] >= 8 or n % 512 == found[-1] or n < 8 or found[-1] == 2
        assert found[-1] > 1 or n == 1
        if n >= 16:
            assert widths(n, chunk, 16)[-1] >= 16
    assert widths(19, 16) == [10, 9]
    assert widths(517, 512) == [512, 5]


def test_progress_tells_the_tokens_done(models: dict[str, Path]) -> None:
    path = models["llama"]
    with engine_at(path, budgets(path)[0]) as engine:
        told: list[int] = []
        engine.forward(IDS[:N_PROMPT], progress=told.append)
        assert told == [16, 32]


def test_a_closed_engine_ends_its_streams_and_closes_once_more(models: dict[str, Path]) -> None:
    path = models["llama"]
    with engine_at(path, budgets(path)[0]) as engine:
        engine.forward(IDS[:5])
        engine.close()
        with pytest.raises(Cancelled, match="closed"):
            engine.forward(IDS[:5])


def test_embedding_rows_come_from_the_pinned_head_or_from_flash(models: dict[str, Path]) -> None:
    """A token may be looked up in a tied head that is pinned, half pinned, or not pinned at all."""
    path = models["llama"]
    every_id = list(range(0, N_VOCAB, 13))[:30]
    results = []
    for budget in budgets(path, 7):
        with engine_at(path, budget) as engine:
            results.append(engine.forward(every_id).copy())
    assert all(np.array_equal(result, results[-1]) for result in results)


class Reads:
    """Counts what is read while it is on."""

    def __init__(self, store: Store) -> None:
        self.store, self.how, self.sizes = store, store.how, list[int]()

    def read_into(self, file: int, offset: int, n_bytes: int, buffer: memoryview, at: int) -> int:
        self.sizes.append(n_bytes)
        return self.store.read_into(file, offset, n_bytes, buffer, at)

    def close(self) -> None:
        self.store.close()


def test_a_resident_engine_reads_no_weights_after_loading(models: dict[str, Path]) -> None:
    path = models["olmo2"]  # untied: its embedding rows do come from flash
    stores: list[Reads] = []

    def wrap(store: Store) -> Store:
        stores.append(Reads(store))
        return stores[0]

    with engine_at(path, GB, wrap=wrap) as engine:
        stores[0].sizes.clear()
        engine.forward(IDS[:20])
        assert set(stores[0].sizes) == {64 * 4}
        assert engine.window.bytes_streamed == 0
