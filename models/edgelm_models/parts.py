"""The two parts that nearly all transformers share: projections to q, k, v and the gated feed-forward network.

Every tensor is looked up where a file may have it: fused or apart, with biases or without.
"""

from __future__ import annotations

import numpy as np

from edgelm.engine.architecture import ModelConfig
from edgelm.engine.ir import Activation
from edgelm.engine.ops import Ops, Tensor, Weights
from edgelm.errors import UnsupportedModel


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


def inverse_sqrt(n: int) -> float:
    """Return 1 / sqrt(n) rounded twice to float32, as kernels and reference implementations do."""
    return 1.0 / float(np.sqrt(np.float32(n)))


def encodes_both_ways(cfg: ModelConfig) -> None:
    """Raise `UnsupportedModel` for an encoder whose tokens see only those before them."""
    if cfg.meta.bool("attention.causal", default=False):
        raise UnsupportedModel("an encoder with causal attention is not supported; use a model that embeds texts")
