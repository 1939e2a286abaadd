"""EmbeddingGemma: libllama's vectors for every window, pattern, rotation and dense layer; and what is refused.

Files whose layers all slide are compared between the backends only: there libllama ends the process.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edgelm
from edgelm.engine.architecture import record
from edgelm.engine.embedding import Pooling, pool
from edgelm.engine.ir import EncodeSpec, RopeSpec
from edgelm.engine.registry import get_architecture
from edgelm.errors import ModelFileError, UnsupportedModel
from edgelm.files import open_model
from edgelm.testing.tiny_encoder import tiny_gemma_embedding

TEXTS = ("The weather in the town is 12 and cold, or so they say!", "again", "", "one and the other " * 12)
PATTERN, WINDOW = (f"gemma-embedding.attention.sliding_window{end}" for end in ("_pattern", ""))
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "each sees itself": {"sliding_window": 1},
    "odd window": {"sliding_window": 7},
    "window beyond the text": {"sliding_window": 1000},
    "default pattern": {"n_layers": 7, "window_pattern": 0},
    "listed pattern": {"metadata": {PATTERN: [False, True, True]}},
    "default sliding base": {"rope_base_swa": 0.0},
    "linear": {"rope_scaling": "linear"},
    "yarn": {"rope_scaling": "yarn"},
    "several kv heads": {"head_dim": 16, "n_kv_heads": 2},
    "blocks": {"types": "Q8_0"},
    "dense": {"dense": 96},
    "narrow dense": {"dense": 32},
    "dense blocks": {"dense": 96, "types": "Q8_0", "pooling": "cls"},
}


def theirs(path: Path) -> np.ndarray[Any, Any]:
    llama_cpp = pytest.importorskip("llama_cpp", reason="needs llama-cpp-python to compare with")
    model = llama_cpp.Llama(
        str(path), n_threads=1, n_threads_batch=1, verbose=False, embedding=True, n_ctx=256, flash_attn=False
    )
    try:
        return np.array([model.embed(text, normalize=True) for text in TEXTS], np.float32)
    finally:
        model.close()


def ours(path: Path, backend: str, **options: Any) -> np.ndarray[Any, Any]:
    with edgelm.load(path, backend=backend, threads=1) as model:
        return model.embed(TEXTS, **options)


@pytest.mark.parametrize("variant", VARIANTS)
def test_vectors_equal_libllama(variant: str, tmp_path: Path) -> None:
    """The longest text has 111 tokens, the usual window 16. `numpy` has neither ggml's table of GELU nor its blocks."""
    options = VARIANTS[variant]
    path = tiny_gemma_embedding(tmp_path / "tiny.gguf", n_context=256, **options)
    expected = theirs(path)
    assert np.abs(ours(path, "llamacpp") - expected).max() <= 1e-6
    assert np.abs(ours(path, "numpy") - expected).max() <= (1e-3 if "types" not in options else 2e-2)


def test_all_layers_slide(tmp_path: Path) -> None:
    path = tiny_gemma_embedding(tmp_path / "tiny.gguf", n_context=256, metadata={PATTERN: 0})
    assert np.abs(ours(path, "numpy") - ours(path, "llamacpp")).max() <= 1e-3


def test_layers_differ_as_the_file_says(tmp_path: Path) -> None:
    """The last sixth layer sees everything, on the base of the file; the others slide on their own."""
    path = tiny_gemma_embedding(tmp_path / "tiny.gguf", n_layers=7, window_pattern=0)
    model = open_model(path)
    trace = record(get_architecture(model.architecture), model, 128)
    params = [op.params for op in trace.ops]
    assert [spec.window for spec in params if isinstance(spec, EncodeSpec)] == [16] * 5 + [0, 16]
    assert [spec.base for spec in params if isinstance(spec, RopeSpec)] == [1e4] * 10 + [1e6] * 2 + [1e4] * 2


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
@pytest.mark.parametrize("backend", ["numpy", "llamacpp"])
def test_dense_layers_come_after_the_pooling(backend: str, pooling: Pooling, tmp_path: Path) -> None:
    plain = tiny_gemma_embedding(tmp_path / "plain.gguf", n_context=256)
    path = tiny_gemma_embedding(tmp_path / "dense.gguf", n_context=256, dense=96)
    pooled = ours(plain, backend, pooling=pooling, normalize=False)
    expected = pooled @ tensor(path, "dense_2.weight").T @ tensor(path, "dense_3.weight").T
    found = ours(path, backend, pooling=pooling, normalize=False)
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize(("types", "most"), [("F16", 5e-4), ("Q8_0", 1e-2)])
def test_dense_layers_of_other_types(types: str, most: float, tmp_path: Path) -> None:
    """Kernels for such weights round what they multiply: libllama the mean of the rows, edgelm each of the rows."""
    path = tiny_gemma_embedding(tmp_path / "tiny.gguf", n_context=256, dense=96, types=types)
    found, expected = ours(path, "llamacpp"), theirs(path)
    assert np.abs(found - expected).max() <= most
    assert (found * expected).sum(axis=1).min() >= 1 - most / 10


def test_vectors_of_tokens(tmp_path: Path) -> None:
    path = tiny_gemma_embedding(tmp_path / "tiny.gguf", dense=96)
    with edgelm.load(path, backend="numpy") as model:
        ids, rows = model.tokenizer.encode(TEXTS[0]), model.embed_tokens(TEXTS[0])
        assert (ids[0], ids[-1]) == (model.tokenizer.bos_id, model.tokenizer.eos_id)
        assert rows.shape == (len(ids), 64)
        assert np.array_equal(pool(rows, "mean"), model.embed(TEXTS[:1], normalize=False)[0])


@pytest.mark.parametrize(
    ("metadata", "error", "message"),
    [
        ({WINDOW: None}, UnsupportedModel, "does not say gemma-embedding.attention.sliding_window"),
        ({WINDOW: 0}, ModelFileError, "sliding_window is 0"),
        ({WINDOW: "wide"}, ModelFileError, "is of type str"),
        ({PATTERN: [True]}, ModelFileError, "has 1 truth values, 3 are needed"),
        ({"gemma-embedding.attention.layer_norm_rms_epsilon": None}, UnsupportedModel, "does not say"),
        ({"gemma-embedding.attention.causal": True}, UnsupportedModel, "causal attention"),
        ({"gemma-embedding.dense_2_feat_in": None}, UnsupportedModel, "does not say gemma-embedding.dense_2_feat_in"),
        ({"gemma-embedding.dense_3_feat_out": 32}, UnsupportedModel, "'dense_3.weight' is 96 x 64, .* says 96 x 32"),
    ],
)
def test_unsound_files_are_refused(
    metadata: dict[str, Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    path = tiny_gemma_embedding(tmp_path / "tiny.gguf", dense=96, metadata=metadata)
    with pytest.raises(error, match=message):
        edgelm.load(path, backend="numpy")


def test_missing_dense_layers_are_refused(tmp_path: Path) -> None:
    widths = {"gemma-embedding.dense_2_feat_in": 64, "gemma-embedding.dense_2_feat_out": 96}
    path = tiny_gemma_embedding(tmp_path / "tiny.gguf", metadata=widths)
    with pytest.raises(UnsupportedModel, match=r"no tensor 'dense_2\.weight'"):
        edgelm.load(path, backend="numpy")


@pytest.mark.parametrize("backend", ["onnx", "mlx", "npu", "npu+numpy"])
def test_other_backends_refuse(backend: str, tmp_path: Path) -> None:
    path = tiny_gemma_embedding(tmp_path / "tiny.gguf")
    with pytest.raises((UnsupportedModel, edgelm.BackendUnavailable)):
        edgelm.load(path, backend=backend)


def tensor(path: Path, name: str) -> np.ndarray[Any, Any]:
    """Return a float32 matrix of a file."""
    model = open_model(path)
    info = model.tensors[name]
    raw = model.paths[info.file].read_bytes()[info.offset : info.offset + info.n_bytes]
    return np.frombuffer(raw, "<f4").reshape(info.n_rows, info.shape[0])
