"""Tiny random models of every architecture that edgelm runs, as GGUF files that llama.cpp loads too.

Knows each architecture's tensors and metadata keys by name, as converters write them; not what they compute.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from edgelm.files.ggml_types import TensorType
from edgelm.testing.blocks import random_weights
from edgelm.testing.gguf_writer import TensorData, write_gguf, write_split_gguf
from edgelm.testing.tiny_vocab import gpt2_vocab, llama_vocab

_ROPE_SCALINGS = ("", "linear", "yarn", "llama3", "longrope")


@dataclass(frozen=True, slots=True)
class TinySpec:
    """The shape of a tiny model. A zero means: as the architecture has it, or not at all."""

    architecture: str
    vocab: str = "gpt2"
    """`gpt2` (byte-level BPE) or `llama` (SentencePiece)."""
    pre: str = "gpt-2"
    n_vocab: int = 0
    """Unused tokens fill the vocabulary up to this."""
    n_layers: int = 3
    n_embd: int = 64
    n_heads: int = 4
    n_kv_heads: int = 2
    head_dim: int = 16
    rope_dim: int = 0
    """Rotated dimensions of a head; 0 means all."""
    n_ff: int = 128
    n_context: int = 256
    tied: bool = True
    biases: bool = False
    """Biases of q, k and v; with llama and granite also of the attention's output."""
    fused: bool = False
    """One attn_qkv, and gate and up in one ffn_up, as phi3 has them."""
    qk_norm: str = ""
    """`head` (over each head) or `all` (over all heads at once)."""
    pre_norms: bool = True
    post_norms: bool = False
    rope_base: float = 10_000.0
    rope_base_swa: float = 0.0
    rope_scaling: str = ""
    """`linear`, `yarn`, `llama3` (factors in rope_freqs.weight) or `longrope` (short and long factors)."""
    rope_factor: float = 4.0
    n_original_context: int = 64
    """What `yarn` and `longrope` were stretched from."""
    sliding_window: int = 0
    window_pattern: int = 0
    """Every so many layers one looks at everything; written only if not 0."""
    attn_softcap: float = 0.0
    final_softcap: float = 0.0
    embedding_scale: float = 0.0
    residual_scale: float = 0.0
    attention_scale: float = 0.0
    logit_scale: float = 0.0

    def __post_init__(self) -> None:
        assert self.vocab in ("gpt2", "llama"), f"unknown vocabulary {self.vocab!r}"
        assert self.rope_scaling in _ROPE_SCALINGS, f"unknown rope scaling {self.rope_scaling!r}"
        assert self.n_heads % self.n_kv_heads == 0, "each KV head serves the same number of heads"

    @property
    def q_dim(self) -> int:
        """Length of all queries of a token."""
        return self.n_heads * self.head_dim

    @property
    def kv_dim(self) -> int:
        """Length of all keys of a token."""
        return self.n_kv_heads * self.head_dim


SPECS: dict[str, TinySpec] = {
    spec.architecture: spec
    for spec in (
        TinySpec("llama", pre="smollm"),
        TinySpec("qwen2", pre="qwen2", biases=True, rope_base=1_000_000.0),
        TinySpec("qwen3", pre="qwen2", head_dim=32, qk_norm="head", rope_base=1_000_000.0),
        TinySpec(
            "gemma2", vocab="llama", head_dim=32, post_norms=True, sliding_window=16,
            attn_softcap=50.0, final_softcap=30.0,
        ),
        TinySpec(
            "gemma3", vocab="llama", n_kv_heads=1, head_dim=32, qk_norm="head", post_norms=True, sliding_window=16,
            window_pattern=2, rope_base=1_000_000.0, rope_base_swa=10_000.0,
        ),
        TinySpec("phi3", vocab="llama", tied=False, fused=True),
        TinySpec("smollm3", pre="llama-bpe", n_layers=5, rope_base=5_000_000.0),
        TinySpec(
            "granite", embedding_scale=3.0, residual_scale=0.5, attention_scale=0.125, logit_scale=2.0,
        ),
        TinySpec("olmo2", tied=False, qk_norm="all", pre_norms=False, post_norms=True, rope_base=500_000.0),
    )
}  # fmt: skip
"""The defaults of each architecture."""

ARCHITECTURES = tuple(SPECS)


def tiny_spec(architecture: str, types: str | Mapping[str, str] = "F32", **overrides: Any) -> TinySpec:
    """Return the architecture's defaults with `overrides`; four times as wide if `types` has blocks of 256."""
    spec = SPECS[architecture]
    names = [types] if isinstance(types, str) else types.values()
    if any(TensorType[name].block_size > 64 for name in names):
        spec = replace(spec, n_embd=4 * spec.n_embd, head_dim=4 * spec.head_dim, n_ff=4 * spec.n_ff)
    return replace(spec, **overrides)


def tiny_model(
    path: Path | str,
    architecture: str,
    *,
    seed: int = 0,
    types: str | Mapping[str, str] = "F32",
    n_parts: int = 1,
    metadata: Mapping[str, Any] | None = None,
    **overrides: Any,
) -> Path:
    """Write a random model of `architecture` (one of `ARCHITECTURES`) and return the path to open.

    `types` is the type of all matrices, or types by tensor kind with a default:
    `{"default": "Q4_K", "ffn_down": "Q6_K", "token_embd": "Q8_0"}`; norms and biases are F32. `metadata` is added, a
    value of None removes a key. `overrides` are fields of `TinySpec`. The same arguments give the same bytes.
    """
    own, tensors = tiny_parts(tiny_spec(architecture, types, **overrides), types, seed, metadata)
    keys = {key: value for key, value in own.items() if value is not None}
    if n_parts > 1:
        return write_split_gguf(path, keys, tensors, n_parts)[0]
    return write_gguf(path, keys, tensors)


def tiny_parts(
    spec: TinySpec, types: str | Mapping[str, str], seed: int, metadata: Mapping[str, Any] | None = None
) -> tuple[dict[str, Any], list[TensorData]]:
    """Return the metadata and the tensors of a random model."""
    keys = {**_metadata(spec), **(metadata or {})}
    return keys, list(_tensors(spec, len(keys["tokenizer.ggml.tokens"]), types, seed))


def _metadata(spec: TinySpec) -> dict[str, Any]:
    vocab = llama_vocab(spec.n_vocab) if spec.vocab == "llama" else gpt2_vocab(spec.pre, spec.n_vocab)
    own: dict[str, Any] = {
        "vocab_size": len(vocab["tokenizer.ggml.tokens"]),
        "context_length": spec.n_context,
        "embedding_length": spec.n_embd,
        "block_count": spec.n_layers,
        "feed_forward_length": spec.n_ff,
        "attention.head_count": spec.n_heads,
        "attention.head_count_kv": spec.n_kv_heads,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.freq_base": spec.rope_base,
        "rope.dimension_count": spec.rope_dim or spec.head_dim,
    }
    if spec.head_dim * spec.n_heads != spec.n_embd:
        own |= {"attention.key_length": spec.head_dim, "attention.value_length": spec.head_dim}
    optional = {
        "attention.sliding_window": spec.sliding_window,
        "attention.sliding_window_pattern": spec.window_pattern,
        "rope.freq_base_swa": spec.rope_base_swa,
        "attn_logit_softcapping": spec.attn_softcap,
        "final_logit_softcapping": spec.final_softcap,
        "embedding_scale": spec.embedding_scale,
        "residual_scale": spec.residual_scale,
        "attention.scale": spec.attention_scale,
        "logit_scale": spec.logit_scale,
    }
    own |= {key: value for key, value in optional.items() if value} | _rope_scaling(spec)
    # llama.cpp patches the vocabulary of models with phi3 in their name
    general = {"general.architecture": spec.architecture, "general.name": "tiny random model"}
    return {**general, **{f"{spec.architecture}.{key}": value for key, value in own.items()}, **vocab}


def _rope_scaling(spec: TinySpec) -> dict[str, Any]:
    if spec.rope_scaling in ("linear", "yarn"):
        keys: dict[str, Any] = {"rope.scaling.type": spec.rope_scaling, "rope.scaling.factor": spec.rope_factor}
        if spec.rope_scaling == "yarn":
            keys["rope.scaling.original_context_length"] = spec.n_original_context
        return keys
    if spec.rope_scaling == "longrope":
        return {
            "rope.scaling.type": "longrope",
            "rope.scaling.attn_factor": 1.1902,
            "rope.scaling.original_context_length": spec.n_original_context,
        }
    return {}


def _tensors(spec: TinySpec, n_vocab: int, types: str | Mapping[str, str], seed: int) -> Iterator[TensorData]:
    for name, shape, gain in _shapes(spec, n_vocab):
        rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
        if len(shape) == 1:
            mean = _head_norm(spec) if name == "output_norm.weight" else 1.0
            yield TensorData(name, TensorType.F32, shape, partial(_vector, name, shape[0], mean, gain, rng))
            continue
        kind = TensorType[types if isinstance(types, str) else _type_of(name, types)]
        spread = gain / math.sqrt(shape[0])
        yield TensorData(name, kind, shape, partial(random_weights, kind, shape[0] * shape[1], spread, rng))


def _type_of(name: str, types: Mapping[str, str]) -> str:
    short = name.removesuffix(".weight").split(".")[-1]
    return types.get(short, types["default"])


def _vector(name: str, n: int, mean: float, gain: float, rng: np.random.Generator) -> bytes:
    """Return norms near `mean`, biases near 0, rope factors rising from 1 to `gain`."""
    if name.startswith("rope_"):
        return np.linspace(1.0, gain, n).astype("<f4").tobytes()
    values = rng.normal(0.0, gain, n) if name.endswith(".bias") else rng.normal(mean, gain * mean, n)
    return values.astype("<f4").tobytes()


def _embedding_gain(spec: TinySpec) -> float:
    """Return the gain that makes embeddings, after the model's own scaling, 3.2 long beside blocks of spread 1.

    With longer ones, a tied head would only repeat the last token.
    """
    scale = math.sqrt(spec.n_embd) if spec.architecture.startswith("gemma") else spec.embedding_scale or 1.0
    return 3.2 * (spec.residual_scale or 1.0) / scale


def _head_norm(spec: TinySpec) -> float:
    """Return the mean of the last norm that gives logits a spread of about 3, so that rounding decides no token."""
    return 3.0 * (spec.logit_scale or 1.0) / _embedding_gain(spec)


def _shapes(spec: TinySpec, n_vocab: int) -> Iterator[tuple[str, tuple[int, ...], float]]:
    """Yield each tensor's name, shape and gain: the spread of the outputs for inputs of spread 1."""
    yield "token_embd.weight", (spec.n_embd, n_vocab), _embedding_gain(spec)
    yield "output_norm.weight", (spec.n_embd,), 0.1
    if not spec.tied:
        yield "output.weight", (spec.n_embd, n_vocab), _embedding_gain(spec)
    n_factors = (spec.rope_dim or spec.head_dim) // 2
    if spec.rope_scaling == "llama3":
        yield "rope_freqs.weight", (n_factors,), 8.0
    if spec.rope_scaling == "longrope":
        yield "rope_factors_long.weight", (n_factors,), 16.0
        yield "rope_factors_short.weight", (n_factors,), 1.5
    for layer in range(spec.n_layers):
        for name, shape, gain in (*_attention(spec), *_feed_forward(spec)):
            yield f"blk.{layer}.{name}", shape, gain


def _attention(spec: TinySpec) -> Iterator[tuple[str, tuple[int, ...], float]]:
    n, q_dim, kv_dim = spec.n_embd, spec.q_dim, spec.kv_dim
    if spec.pre_norms:
        yield "attn_norm.weight", (n,), 0.1
    if spec.fused:
        yield "attn_qkv.weight", (n, q_dim + 2 * kv_dim), 1.5
    else:
        for letter, dim in (("q", q_dim), ("k", kv_dim), ("v", kv_dim)):
            yield f"attn_{letter}.weight", (n, dim), 1.5
            if spec.biases:
                yield f"attn_{letter}.bias", (dim,), 0.5
    if spec.qk_norm:
        yield "attn_q_norm.weight", (spec.head_dim if spec.qk_norm == "head" else q_dim,), 0.3
        yield "attn_k_norm.weight", (spec.head_dim if spec.qk_norm == "head" else kv_dim,), 0.3
    yield "attn_output.weight", (q_dim, n), 1.0
    if spec.biases and spec.architecture in ("llama", "granite"):
        yield "attn_output.bias", (n,), 0.3
    if spec.post_norms:
        yield "post_attention_norm.weight", (n,), 0.1


def _feed_forward(spec: TinySpec) -> Iterator[tuple[str, tuple[int, ...], float]]:
    n, n_ff = spec.n_embd, spec.n_ff
    if spec.pre_norms:
        yield "ffn_norm.weight", (n,), 0.1
    if spec.fused:
        yield "ffn_up.weight", (n, 2 * n_ff), 1.0
    else:
        yield "ffn_gate.weight", (n, n_ff), 1.0
        yield "ffn_up.weight", (n, n_ff), 1.0
    yield "ffn_down.weight", (n_ff, n), 1.0
    if spec.post_norms:
        yield "post_ffw_norm.weight", (n,), 0.1
