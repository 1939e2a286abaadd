"""The simulated NPU inside an engine: the same bits at every budget and cut, and how far it is from the oracle."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from engines import budgets, engine_at, shrink
from numpy.typing import NDArray

from edgelm.engine.wishes import Wishes
from edgelm.opening import open_engine
from edgelm.sizes import GB
from edgelm.testing import tiny_model

IDS = np.random.default_rng(7).integers(3, 250, 48).tolist()
TEXT = Path(__file__).parents[2] / "docs/budgets.md"


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_every_budget_gives_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, architecture: str) -> None:
    shrink(monkeypatch)
    path = tiny_model(tmp_path / "tiny.gguf", architecture, n_vocab=384)
    with engine_at(path, GB, backend="npu") as engine:
        expected = [engine.forward(IDS[:40]).copy(), engine.forward([IDS[40]]).copy()]
    for budget in budgets(path, backend="npu"):
        with engine_at(path, budget, backend="npu") as engine:
            found = [engine.forward(IDS[:40]).copy(), engine.forward([IDS[40]]).copy()]
            assert np.array_equal(found, expected)


@pytest.mark.models
@pytest.mark.slow
@pytest.mark.parametrize("name", ["smollm2-135m-instruct", "gemma-3-270m"])
def test_real_models_stay_close_to_the_oracle(real_model: Callable[[str], Path], name: str) -> None:
    path = real_model(name)
    oracle, ours = (log_softmax(logits_of(path, backend)) for backend in ("numpy", "npu"))
    kl = (np.exp(oracle) * (oracle - ours)).sum(axis=1)
    assert kl.mean() <= 0.05, "the bar"
    assert kl.mean() <= 0.015, "what was measured, with room: docs/npu.md"
    assert (oracle.argmax(axis=1) == ours.argmax(axis=1)).mean() >= 0.88


@pytest.mark.models
@pytest.mark.slow
@pytest.mark.parametrize("answers", ["numpy", "llamacpp"])
def test_real_answers_are_those_of_the_processor_on_the_same_cache(
    real_model: Callable[[str], Path], answers: str
) -> None:
    """Prompt on the NPU, answer on the processor: tokens and logits of the processor alone on that cache."""
    path = real_model("smollm2-135m-instruct")
    options = {"memory": "2GB", "threads": 2, "context": 512}
    both = open_engine(path, Wishes(backend=f"npu+{answers}", **options))  # type: ignore[arg-type]
    alone = open_engine(path, Wishes(backend=answers, **options))  # type: ignore[arg-type]
    try:
        ids = both.tokenizer.encode(TEXT.read_text(encoding="utf-8"))[:150]
        ours = both.engine.forward(ids).copy()
        alone.engine.arena.copy_from(both.engine.arena)
        alone.engine.arena.truncate(len(ids) - 1)
        theirs = alone.engine.forward(ids[-1:]).copy()
        for _ in range(8):
            assert np.array_equal(ours, theirs)
            token = int(ours[-1].argmax())
            ours, theirs = (one.engine.forward([token]).copy() for one in (both, alone))
    finally:
        both.engine.close()
        alone.engine.close()


@pytest.mark.models
@pytest.mark.slow
@pytest.mark.parametrize("memory", ["130MB", "200MB", "320MB"])
def test_two_backends_stay_within_one_budget(real_model: Callable[[str], Path], memory: str) -> None:
    """From nearly all weights streamed to all in memory; a process of its own, whose peak the kernel tells."""
    argv = [sys.executable, "-m", "edgelm_apps.cli", "run", str(real_model("smollm2-135m-instruct"))]
    argv += [TEXT.read_text(encoding="utf-8")[:1500], "--raw", "--max-tokens", "8", "--context", "1024", "--json"]
    argv += ["--backend", "npu+numpy", "--memory", memory, "--threads", "2"]
    done = subprocess.run(argv, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=True)
    answer = json.loads(done.stdout)
    assert answer["simulated"] == "npu"
    assert 0 < answer["stats"]["peak_bytes"] <= answer["budget_bytes"]
    assert (answer["stats"]["bytes_streamed"] > 0) == (memory != "320MB")


def logits_of(path: Path, backend: str) -> NDArray[np.float32]:
    opened = open_engine(path, Wishes(memory="2GB", backend=backend, threads=2, context=512, max_outputs=16))
    try:
        ids = opened.tokenizer.encode(TEXT.read_text(encoding="utf-8"))[:256]
        return np.concatenate([opened.engine.forward(ids[i : i + 16], 16).copy() for i in range(0, len(ids), 16)])
    finally:
        opened.engine.close()


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
