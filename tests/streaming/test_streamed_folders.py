"""Folders stream like files: whatever is derived on the way, the bits are those of resident weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engines import BACKENDS, budgets, engine_at, need, shrink

from edgelm.memory import derived
from edgelm.testing import tiny_folder
from edgelm.testing.evaluate import evaluate, logits_error

IDS = np.random.default_rng(7).integers(3, 250, 24).tolist()
N_PROMPT = 18
FOLDERS: dict[str, tuple[str, dict[str, Any]]] = {
    "half precision": ("gemma3", {"dtype": "BF16", "n_files": 2}),
    "exact": (
        "llama",
        {"dtype": "F16", "quantized": {"": (4, 32), "v_proj": (2, 64), "down": (3, 128), "o_proj": (5, 32)}},
    ),
    "inexact": ("qwen3", {"dtype": "BF16", "quantized": {"": (8, 64), "up_proj": (6, 32)}}),
}


@pytest.fixture(autouse=True)
def _small_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    shrink(monkeypatch)
    monkeypatch.setattr(derived, "STEP_BYTES", 3000)


@pytest.fixture(params=FOLDERS)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    architecture, options = FOLDERS[request.param]
    return tiny_folder(tmp_path / "model", architecture, n_vocab=384, **options)


@pytest.mark.parametrize("backend", BACKENDS)
def test_streamed_logits_have_the_bits_of_resident_ones(folder: Path, backend: str) -> None:
    results, streamed = [], []
    for budget in budgets(folder, 3, backend=need(backend)):
        with engine_at(folder, budget, backend=backend) as engine:
            streamed.append(engine.plan.streamed_bytes)
            rows = [engine.forward(IDS[:N_PROMPT])[-1].copy()]
            results.append(np.stack(rows + [engine.forward([token])[-1].copy() for token in IDS[N_PROMPT:]]))
    assert streamed[0] > streamed[-1] == 0
    for result in results:
        assert np.array_equal(result, results[-1])


def test_other_backends_compute_with_converted_weights(folder: Path) -> None:
    numpy, llamacpp = evaluate(folder, IDS), evaluate(folder, IDS, backend=need("llamacpp"))
    assert logits_error(llamacpp, numpy) < 0.2  # ggml rounds activations to 8 bits or to bfloat16
