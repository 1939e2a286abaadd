"""Tiny random models that embed texts, as GGUF files that llama.cpp loads too: bert, nomic-bert and gemma-embedding.

Knows tensors and metadata keys by name, as converters write them; not what they compute.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from edgelm.files.ggml_types import TensorType
from edgelm.testing.blocks import random_weights
from edgelm.testing.gguf_writer import TensorData, write_gguf
from edgelm.testing.tiny import TinySpec, tiny_parts
from edgelm.testing.tiny_vocab import bert_vocab

ENCODERS = ("bert", "nomic-bert", "gemma-embedding")
POOLINGS = {"none": 0, "mean": 1, "cls": 2, "last": 3, "rank": 4}
N_LAYERS, N_EMBD, N_HEADS, N_FF = 3, 64, 4, 128
_GEMMA = TinySpec(
    "gemma-embedding", vocab="llama", n_layers=N_LAYERS, n_embd=N_EMBD, n_heads=N_HEADS, n_kv_heads=1, head_dim=32,
    n_ff=N_FF, n_context=128, qk_norm="head", post_norms=True, rope_base=1_000_000.0, rope_base_swa=10_000.0,
    sliding_window=16, window_pattern=2,
)  # fmt: skip


def tiny_encoder(
    path: Path | str,
    architecture: str,
    *,
    pooling: str | None = "mean",
    types: str = "F32",
    table_type: str = "F32",
    n_context: int = 128,
    n_embd: int = N_EMBD,
    seed: int = 0,
    metadata: Mapping[str, Any] | None = None,
) -> Path:
    """Write a random encoder and return its path. `types`: of the matrices, `table_type`: of positions and types.

    `metadata` is added, a value of None removes a key. The same arguments give the same bytes.
    """
    if architecture == "gemma-embedding":
        return tiny_gemma_embedding(
            path, pooling=pooling, types=types, seed=seed, metadata=metadata, n_context=n_context, n_embd=n_embd
        )
    vocab = bert_vocab()
    own: dict[str, Any] = {
        "context_length": n_context,
        "embedding_length": n_embd,
        "block_count": N_LAYERS,
        "feed_forward_length": 2 * n_embd,
        "attention.head_count": N_HEADS,
        "attention.layer_norm_epsilon": 1e-12 if architecture == "bert" else 1e-5,
        "attention.causal": False,
    }
    if architecture == "nomic-bert":
        own["rope.freq_base"] = 1000.0
    if pooling is not None:
        own["pooling_type"] = POOLINGS[pooling]
    keys = {
        "general.architecture": architecture,
        **{f"{architecture}.{key}": value for key, value in own.items()},
        **vocab,
        **(metadata or {}),
    }
    shapes = _shapes(architecture, n_embd, n_context, len(vocab["tokenizer.ggml.tokens"]))
    tensors = [_tensor(name, shape, types, table_type, seed) for name, shape in shapes]
    return write_gguf(path, {key: value for key, value in keys.items() if value is not None}, tensors)


def tiny_gemma_embedding(
    path: Path | str,
    *,
    pooling: str | None = "mean",
    types: str = "F32",
    dense: int = 0,
    seed: int = 0,
    metadata: Mapping[str, Any] | None = None,
    **overrides: Any,
) -> Path:
    """Write a random gemma-embedding model and return its path. Layers 0 and 2 slide, layer 1 sees everything.

    `dense`: the width between the two dense layers, 0 for a file without them. `overrides` are fields of `TinySpec`;
    the rest is as for `tiny_encoder`.
    """
    spec = replace(_GEMMA, **overrides)
    own: dict[str, Any] = {"attention.causal": False}
    if pooling is not None:
        own["pooling_type"] = POOLINGS[pooling]
    if dense:
        own |= {"dense_2_feat_in": spec.n_embd, "dense_2_feat_out": dense}
        own |= {"dense_3_feat_in": dense, "dense_3_feat_out": spec.n_embd}
    keys = {**{f"{spec.architecture}.{key}": value for key, value in own.items()}, "tokenizer.ggml.add_eos_token": True}
    keys, tensors = tiny_parts(spec, types, seed, {**keys, **(metadata or {})})
    if dense:
        shapes = (("dense_2.weight", (spec.n_embd, dense)), ("dense_3.weight", (dense, spec.n_embd)))
        tensors += [_tensor(name, shape, types, types, seed) for name, shape in shapes]
    return write_gguf(path, {key: value for key, value in keys.items() if value is not None}, tensors)


def _tensor(name: str, shape: tuple[int, ...], types: str, table_type: str, seed: int) -> TensorData:
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    if len(shape) == 1:
        mean, spread = (1.0, 0.2) if name.endswith("norm.weight") else (0.0, 0.3)
        return TensorData(name, TensorType.F32, shape, rng.normal(mean, spread, shape[0]).astype("<f4").tobytes())
    small = name in ("position_embd.weight", "token_types.weight")
    kind, n = TensorType[table_type if small else types], shape[0] * shape[1]
    spread = 0.3 if small else 1.0 if name == "token_embd.weight" else 1.5 / shape[0] ** 0.5
    return TensorData(name, kind, shape, bytes(random_weights(kind, n, spread, rng)))


def _shapes(architecture: str, n: int, n_context: int, n_vocab: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    bert = architecture == "bert"
    yield "token_embd.weight", (n, n_vocab)
    yield "token_types.weight", (n, 2)
    if bert:
        yield "position_embd.weight", (n, n_context)
    yield "token_embd_norm.weight", (n,)
    yield "token_embd_norm.bias", (n,)
    matrices: dict[str, tuple[int, int]] = {"attn_output": (n, n), "ffn_up": (n, 2 * n), "ffn_down": (2 * n, n)}
    if bert:
        matrices |= {f"attn_{letter}": (n, n) for letter in "qkv"}
    else:
        matrices |= {"attn_qkv": (n, 3 * n), "ffn_gate": (n, 2 * n)}
    for layer in range(N_LAYERS):
        for name, shape in matrices.items():
            yield f"blk.{layer}.{name}.weight", shape
            if bert:
                yield f"blk.{layer}.{name}.bias", (shape[1],)
        for name in ("attn_output_norm", "layer_output_norm"):
            yield f"blk.{layer}.{name}.weight", (n,)
            yield f"blk.{layer}.{name}.bias", (n,)
