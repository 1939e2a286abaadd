"""The MLX backend computes the oracle's logits: tiny models of every architecture, and the real models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from edgelm.engine.health import check
from edgelm.engine.loading import computable, open_path
from edgelm.engine.registry import get_backend
from edgelm.testing import ARCHITECTURES, tiny_folder, tiny_model
from edgelm.testing.evaluate import evaluate, logits_error

IDS = [1, 7, 3, 200, 41, 42, 43, 7, 99, 5, 61, 17, 23, 250, 4, 88]
K_TYPES = {"default": "Q4_K", "ffn_down": "Q6_K", "token_embd": "Q8_0"}
WIDE = {"n_embd": 256, "n_ff": 256, "head_dim": 64}  # rows of whole superblocks


@pytest.fixture(scope="module", autouse=True)
def _available() -> None:
    found = check("mlx")
    if not found.available:
        pytest.skip(f"mlx is not available here: {found.reason}")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_tiny_models_equal_the_oracle(tmp_path: Path, architecture: str) -> None:
    passes = (12, 1, 1, 2)
    path = tiny_model(tmp_path / "tiny.gguf", architecture, types=K_TYPES, **WIDE)
    ours = evaluate(path, IDS, backend="mlx", passes=passes)
    theirs = evaluate(path, IDS, passes=passes)
    assert kl(theirs, ours).mean() < 1e-6
    assert logits_error(ours, theirs) < 2e-3  # one bit of a cached float16 may differ


@pytest.mark.parametrize("scheme", [(4, 64), (8, 32), (6, 64)], ids=lambda scheme: f"{scheme[0]} bits of {scheme[1]}")
@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma3"])
def test_quantized_folders_are_continued_as_mlx_lm_does(
    tmp_path: Path, architecture: str, scheme: tuple[int, int]
) -> None:
    """The rows are held as MLX quantized them; greedy tokens are those of mlx-lm with float32 activations."""
    utils = pytest.importorskip("mlx_lm.utils")
    mx = pytest.importorskip("mlx.core")
    folder = tiny_folder(tmp_path / "model", architecture, dtype="BF16", quantized={"": scheme})
    file = computable(open_path(folder), get_backend("mlx"))[0]
    assert all(info.type.affine is not None for info in file.tensors.values() if info.n_rows > 1)
    model, _ = utils.load_model(folder)
    model.set_dtype(mx.float32)
    ids = list(IDS)
    for _ in range(16):
        ids.append(int(model(mx.array([ids]))[0, -1].argmax()))
    ours = evaluate(folder, ids, backend="mlx", passes=(16, *[1] * 16))
    assert ours.argmax(axis=1)[15:-1].tolist() == ids[16:]


@pytest.mark.models
@pytest.mark.parametrize("name", ["smollm2-135m-instruct", pytest.param("gemma-3-270m", marks=pytest.mark.slow)])
def test_real_models_equal_the_oracle(real_model: Callable[[str], Path], name: str) -> None:
    path, ids = real_model(name), [2, *range(500, 512)]
    ours, theirs = (evaluate(path, ids, backend=backend, n_context=256) for backend in ("mlx", "numpy"))
    assert kl(theirs, ours).mean() < 1e-6
    assert (ours.argmax(axis=1) == theirs.argmax(axis=1)).all()


def kl(expected: NDArray[np.float32], found: NDArray[np.float32]) -> NDArray[np.float64]:
    """The Kullback-Leibler divergence of each row of logits, in nats."""
    p, q = (
        row - np.log(np.exp(row).sum(axis=1, keepdims=True))
        for row in (logits.astype(np.float64) - logits.max(axis=1, keepdims=True) for logits in (expected, found))
    )
    divergence: NDArray[np.float64] = (np.exp(p) * (p - q)).sum(axis=1)
    return divergence
