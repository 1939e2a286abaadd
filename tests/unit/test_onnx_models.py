"""The ONNX Runtime backend computes the oracle's logits: tiny models of every architecture, and the real models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from edgelm.engine.health import check
from edgelm.files.index import open_indexed
from edgelm.testing import tiny_model
from edgelm.testing.evaluate import evaluate, logits_error
from edgelm.testing.tiny import ARCHITECTURES
from edgelm.text.tokenizer import load_tokenizer

IDS = [1, 7, 3, 200, 41, 42, 43, 7, 99, 5, 61, 17, 23, 250, 4, 88]
K_TYPES = {"default": "Q4_K", "ffn_down": "Q6_K", "token_embd": "Q8_0"}
WIDE = {"n_embd": 256, "n_ff": 256, "head_dim": 64}  # rows of whole superblocks
DECODE = (12, 1, 1, 2)
TEXT = (
    "She had been forced into prudence in her youth, she learned romance as she grew older: the natural sequel of an "
    "unnatural beginning. A second spring of youth and beauty was what she was sure to find, and she walked along the "
    "shore until the wind turned and the boats came in."
)


@pytest.fixture(scope="module", autouse=True)
def _available() -> None:
    found = check("onnx")
    if not found.available:
        pytest.skip(f"onnx is not available here: {found.reason}")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_float_models_equal_the_oracle(tmp_path: Path, architecture: str) -> None:
    path = tiny_model(tmp_path / "tiny.gguf", architecture)
    ours, theirs = (evaluate(path, IDS, backend=backend, passes=DECODE) for backend in ("onnx", "numpy"))
    assert kl(theirs, ours).mean() < 1e-4
    assert logits_error(ours, theirs) < 2e-2  # queries and attention are kept in float16


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_quantized_models_agree_with_the_oracle(tmp_path: Path, architecture: str) -> None:
    """Within what activations of eight bits cost."""
    path = tiny_model(tmp_path / "tiny.gguf", architecture, types=K_TYPES, **WIDE)
    ours, theirs = (evaluate(path, IDS, backend=backend, passes=DECODE) for backend in ("onnx", "numpy"))
    assert kl(theirs, ours).mean() < 5e-3


@pytest.mark.models
@pytest.mark.parametrize("name", ["smollm2-135m-instruct", pytest.param("gemma-3-270m", marks=pytest.mark.slow)])
def test_real_models_agree_with_the_oracle(real_model: Callable[[str], Path], name: str) -> None:
    path = real_model(name)
    ids = load_tokenizer(open_indexed(path)).encode(TEXT)
    ours, theirs = (evaluate(path, ids, backend=backend, n_context=256) for backend in ("onnx", "numpy"))
    assert kl(theirs, ours).mean() < 5e-3
    assert (ours.argmax(axis=1) == theirs.argmax(axis=1)).mean() > 0.9


def kl(expected: NDArray[np.float32], found: NDArray[np.float32]) -> NDArray[np.float64]:
    """The Kullback-Leibler divergence of each row of logits, in nats."""
    p, q = (
        row - np.log(np.exp(row).sum(axis=1, keepdims=True))
        for row in (logits.astype(np.float64) - logits.max(axis=1, keepdims=True) for logits in (expected, found))
    )
    divergence: NDArray[np.float64] = (np.exp(p) * (p - q)).sum(axis=1)
    return divergence
