"""Quantized matrices through the MLX backend: prepared once, adopted or streamed in tiles, the same bits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from engines import budgets, engine_at, need, shrink

from edgelm.sizes import GB
from edgelm.testing import tiny_model
from edgelm.testing.evaluate import evaluate

IDS = np.random.default_rng(3).integers(3, 250, 30).tolist()
N_PROMPT = 24
MIXED = {"default": "Q4_K", "ffn_down": "Q6_K", "attn_v": "Q5_0", "attn_output": "F16", "token_embd": "Q8_0"}


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    need("mlx")
    shrink(monkeypatch)


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_a_budget_changes_no_bit(tmp_path: Path, architecture: str) -> None:
    path = tiny_model(tmp_path / "m.gguf", architecture, types=MIXED, n_embd=256, n_ff=256, head_dim=64, n_vocab=700)
    results, streamed = [], []
    for budget in budgets(path, 4, backend="mlx"):
        with engine_at(path, budget, backend="mlx") as engine:
            results.append([engine.forward(IDS[:N_PROMPT])[-1].copy()])
            results[-1] += [engine.forward([token])[-1].copy() for token in IDS[N_PROMPT:]]
            streamed.append(engine.plan.streamed_bytes)
    assert streamed[0] > streamed[1] > streamed[-1] == 0
    for result in results:
        assert np.array_equal(result, results[-1])
    expected = evaluate(path, IDS, backend="mlx")[N_PROMPT - 1 :]
    assert np.abs(np.stack(results[-1]) - expected).max() < 1e-3 * expected.std()


def test_what_is_adopted_is_what_the_plan_counts(tmp_path: Path) -> None:
    """MLX's own counter grows by the pinned bytes and the norms, and comes back to nothing."""
    import mlx.core as mx

    path = tiny_model(tmp_path / "m.gguf", "llama", types=MIXED, n_embd=256, n_ff=256, head_dim=64)
    before = mx.get_active_memory()
    with engine_at(path, GB, backend="mlx") as engine:
        engine.forward(IDS)
        units = engine.plan.units
        matrices = sum(part.n_bytes for i in engine.plan.pinned for part in units[i].parts)
        held = mx.get_active_memory() - before
        assert matrices < held < matrices + 20_000
        assert engine._pinned.memory_bytes == 0
    assert mx.get_active_memory() == before
    assert mx.get_cache_memory() == 0
