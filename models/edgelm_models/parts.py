"""The parts that transformers share: projections to q, k, v, the gated feed-forward network, halves of blocks.

Every tensor is looked up where a file may have it: fused or apart, with biases or without.
"""

from __future__ import annotations

import numpy as np

from edgelm.engine.architecture import ModelConfig, rope_spec
from edgelm.engine.ir import Activation, EncodeSpec
from edgelm.engine.ops import Ops, Tensor, Weights
from edgelm.errors import UnsupportedModel

GEMMA_SLIDING_BASE = 10000.0
"""Base of the rotation in Gemma 3's sliding layers, unless the file says otherwise."""


def qkv(ops: Ops, w: Weights, h: Tensor, layer: int, cfg: ModelConfig) -> tuple[Tensor, Tensor, Tensor]:
    """Return the queries, keys and values of `h`, from one fused matrix or from three."""
    if "attn_qkv" not in w:
        q, k, v = (ops.linear(h, w[name], w.get(f"{name}.bias")) for name in ("attn_q", "attn_k", "attn_v"))
        return q, k, v
    if any(f"attn_{name}.bias" in w for name in "qkv"):
        raise UnsupportedModel("fused attention weights with separate biases are not supported; convert the file again")
    fused = ops.linear(h, w["attn_qkv"], w.get("attn_qkv.bias"))
    n_q = cfg.n_heads[layer] * cfg.head_dim_k
    n_k, n_v = cfg.n_kv_heads[layer] * cfg.head_dim_k, cfg.n_kv_heads[layer] * cfg.head_dim_v
    if fused.width != n_q + n_k + n_v:
        raise UnsupportedModel(f"fused attention weights have {fused.width} rows, {n_q + n_k + n_v} are needed")
    return ops.slice(fused, 0, n_q), ops.slice(fused, n_q, n_k), ops.slice(fused, n_q + n_k, n_v)


def feed_forward(ops: Ops, w: Weights, h: Tensor, activation: Activation = "silu") -> Tensor:
    """Return `down(activation(gate(h)) * up(h))`, with biases where the file has them."""
    up = ops.linear(h, w["ffn_up"], w.get("ffn_up.bias"))
    gate = ops.linear(h, w["ffn_gate"], w.get("ffn_gate.bias"))
    return ops.linear(ops.gate(gate, up, activation), w["ffn_down"], w.get("ffn_down.bias"))


def gemma_heads(
    ops: Ops, w: Weights, x: Tensor, layer: int, window: int, cfg: ModelConfig
) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries, keys and values of `x` in Gemma 3: q and k normed for each head, and rotated."""
    n_heads, n_kv_heads = cfg.n_heads[layer], cfg.n_kv_heads[layer]
    sliding = window > 0  # such layers keep plain positions however far the others are stretched
    base = cfg.meta.float("rope.freq_base_swa", default=GEMMA_SLIDING_BASE, least=1.0) if sliding else cfg.rope_base
    q, k, v = qkv(ops, w, ops.rms_norm(x, w["attn_norm"], cfg.eps), layer, cfg)
    q = ops.rms_norm(q, w["attn_q_norm"], cfg.eps, groups=n_heads)
    q = ops.rope(q, rope_spec(cfg, n_heads, neox=True, base=base, scaled=not sliding))
    k = ops.rms_norm(k, w["attn_k_norm"], cfg.eps, groups=n_kv_heads)
    k = ops.rope(k, rope_spec(cfg, n_kv_heads, neox=True, base=base, scaled=not sliding))
    return q, k, v


def between_norms(ops: Ops, w: Weights, h: Tensor, x: Tensor, cfg: ModelConfig) -> Tensor:
    """Return the rest of a block of Gemma 2 or 3 after the attention `h` of `x`: a norm on either side of each half."""
    x = ops.add(ops.rms_norm(h, w["post_attention_norm"], cfg.eps), x)
    h = feed_forward(ops, w, ops.rms_norm(x, w["ffn_norm"], cfg.eps), "gelu")
    return ops.add(ops.rms_norm(h, w["post_ffw_norm"], cfg.eps), x)


def inverse_sqrt(n: int) -> float:
    """Return 1 / sqrt(n) rounded twice to float32, as kernels and reference implementations do."""
    return 1.0 / float(np.sqrt(np.float32(n)))


def encodes_both_ways(cfg: ModelConfig) -> None:
    """Raise `UnsupportedModel` for an encoder whose tokens see only those before them."""
    if cfg.meta.bool("attention.causal", default=False):
        raise UnsupportedModel("an encoder with causal attention is not supported; use a model that embeds texts")


def embed_sentence(ops: Ops, w: Weights) -> Tensor:
    """Return the embeddings of a text that is one sentence: where the file has types, all tokens are of the first."""
    x = ops.embed(w["token_embd"])
    return ops.add_row(x, w["token_types"]) if "token_types" in w else x


def attend_both_ways(ops: Ops, w: Weights, q: Tensor, k: Tensor, v: Tensor, layer: int, cfg: ModelConfig) -> Tensor:
    """Return what the attention of every token to all of them, scaled by the width of a head, puts out."""
    scale = inverse_sqrt(cfg.head_dim_k)
    spec = EncodeSpec(cfg.n_heads[layer], cfg.n_kv_heads[layer], cfg.head_dim_k, cfg.head_dim_v, scale)
    return ops.linear(ops.encode(q, k, v, spec), w["attn_output"], w.get("attn_output.bias"))


def add_and_norm(ops: Ops, w: Weights, h: Tensor, x: Tensor, norm: str, cfg: ModelConfig) -> Tensor:
    """Return the layer norm called `norm` of `h + x`, as models with norms after what they normalize have it."""
    return ops.layer_norm(ops.add(h, x), w[norm], w[f"{norm}.bias"], cfg.eps)
