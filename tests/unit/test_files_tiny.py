"""Tiny models: reproducible, as described, and loaded by llama.cpp."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgelm.files import TensorType, open_model
from edgelm.testing import ARCHITECTURES, RANDOM_TYPES, random_weights, tiny_model, tiny_spec
from edgelm.testing.blocks import encode_floats

TEXT = b"The weather in the town is 12 and cold, or so they say of it; and then more of the same again"

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in ARCHITECTURES},
    "llama untied": ("llama", {"tied": False}),
    "llama biases": ("llama", {"biases": True}),
    "llama linear": ("llama", {"rope_scaling": "linear"}),
    "llama yarn": ("llama", {"rope_scaling": "yarn"}),
    "llama llama3": ("llama", {"rope_scaling": "llama3"}),
    "llama sentencepiece": ("llama", {"vocab": "llama"}),
    "llama split": ("llama", {"n_parts": 3}),
    "llama wide vocabulary": ("llama", {"n_vocab": 1000}),
    "qwen2 yarn": ("qwen2", {"rope_scaling": "yarn"}),
    "qwen3 untied Q4_K": ("qwen3", {"tied": False, "types": "Q4_K"}),
    "gemma3 mixed types": ("gemma3", {"types": {"default": "Q4_K", "ffn_down": "Q6_K", "token_embd": "Q8_0"}}),
    "gemma3 no window": ("gemma3", {"sliding_window": 0, "window_pattern": 0}),
    "phi3 long factors": ("phi3", {"rope_scaling": "longrope"}),
    "phi3 short factors": ("phi3", {"rope_scaling": "longrope", "n_original_context": 1024, "n_context": 1024}),
    "phi3 partly rotated": ("phi3", {"rope_dim": 8}),
    "granite biases": ("granite", {"biases": True}),
    "olmo2 window": ("olmo2", {"sliding_window": 16, "window_pattern": 2}),
    **{f"llama {kind.name}": ("llama", {"types": kind.name}) for kind in sorted(RANDOM_TYPES)},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_llama_cpp_evaluates_it(name: str, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    architecture, options = VARIANTS[name]
    path = tiny_model(tmp_path / "tiny.gguf", architecture, **options)
    model = llama_cpp.Llama(str(path), logits_all=True, n_ctx=128, n_threads=1, n_threads_batch=1, verbose=False)
    try:
        ids = model.tokenize(TEXT)
        model.eval(ids)
        logits = np.array(model.scores[: len(ids)])
    finally:
        model.close()
    assert np.isfinite(logits).all()
    assert 2 < logits.std() < 5
    best = logits.argmax(-1)
    assert len(set(best.tolist())) > 10
    assert (best == ids).mean() < 0.5, "a model that repeats its input would hide errors in its blocks"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_same_arguments_give_the_same_bytes(architecture: str, tmp_path: Path) -> None:
    first = tiny_model(tmp_path / "a.gguf", architecture).read_bytes()
    assert tiny_model(tmp_path / "b.gguf", architecture).read_bytes() == first
    assert tiny_model(tmp_path / "c.gguf", architecture, seed=1).read_bytes() != first
    assert open_model(tmp_path / "a.gguf").architecture == architecture


def test_metadata_can_be_added_and_removed(tmp_path: Path) -> None:
    path = tiny_model(
        tmp_path / "a.gguf", "llama", metadata={"tokenizer.chat_template": None, "general.license": "none"}
    )
    metadata = open_model(path).metadata
    assert "tokenizer.chat_template" not in metadata
    assert metadata["general.license"] == "none"


def test_types_by_kind_of_tensor(tmp_path: Path) -> None:
    path = tiny_model(tmp_path / "a.gguf", "llama", types={"default": "Q4_0", "ffn_down": "Q8_0"})
    tensors = open_model(path).tensors
    assert tensors["blk.0.ffn_down.weight"].type is TensorType.Q8_0
    assert tensors["blk.0.ffn_up.weight"].type is TensorType.Q4_0
    assert tensors["blk.0.attn_norm.weight"].type is TensorType.F32


def test_unknown_options_are_refused() -> None:
    with pytest.raises(TypeError, match="n_lairs"):
        tiny_spec("llama", n_lairs=2)


@pytest.mark.parametrize("kind", sorted(RANDOM_TYPES), ids=lambda kind: kind.name)
def test_random_blocks_have_the_wanted_spread(kind: TensorType) -> None:
    quants = pytest.importorskip("gguf.quants")
    raw = np.frombuffer(random_weights(kind, 256 * 400, 0.05, np.random.default_rng(0)), np.uint8)
    weights = quants.dequantize(raw.reshape(1, -1), quants.GGMLQuantizationType(int(kind)))
    assert weights.size == 256 * 400
    assert weights.std() == pytest.approx(0.05, rel=0.15)
    assert abs(weights.mean()) < 0.01


def test_bf16_rounds_to_nearest_even() -> None:
    bits = np.asarray([0x3F800000, 0x3F808000, 0x3F818000, 0x3F808001], np.uint32)
    encoded = np.frombuffer(encode_floats(TensorType.BF16, bits.view(np.float32)), np.uint16)
    assert encoded.tolist() == [0x3F80, 0x3F80, 0x3F82, 0x3F81]
