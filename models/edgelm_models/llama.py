"""Llama and what is built like it: Llama 2 and 3, SmolLM2, TinyLlama, Mistral (arXiv:2302.13971, 2407.21783)."""

from __future__ import annotations

import math

from edgelm.engine.architecture import ModelConfig, rope_spec
from edgelm.engine.ir import AttendSpec
from edgelm.engine.ops import Ops, Tensor, Weights

ARCHITECTURES = ("llama",)


def record(ops: Ops, w: Weights, cfg: ModelConfig) -> Tensor:
    x = ops.embed(w["token_embd"])
    for layer in range(cfg.n_layers):
        x = block(ops, w, w.block(layer), x, layer, cfg)
    x = ops.rms_norm(x, w["output_norm"], cfg.eps)
    return ops.linear(x, w.get("output") or w["token_embd"])


def block(ops: Ops, model: Weights, w: Weights, x: Tensor, layer: int, cfg: ModelConfig) -> Tensor:
    n_heads, n_kv_heads = cfg.n_heads[layer], cfg.n_kv_heads[layer]
    h = ops.rms_norm(x, w["attn_norm"], cfg.eps)
    q, k, v = (ops.linear(h, w[name], w.get(f"{name}.bias")) for name in ("attn_q", "attn_k", "attn_v"))
    factors = model.get("rope_freqs")  # Llama 3.1 and later
    q = ops.rope(q, rope_spec(cfg, n_heads, neox=False), factors)
    k = ops.rope(k, rope_spec(cfg, n_kv_heads, neox=False), factors)
    scale = cfg.meta.float("attention.scale", default=0.0) or 1 / math.sqrt(cfg.head_dim_k)
    spec = AttendSpec(layer, n_heads, n_kv_heads, cfg.head_dim_k, cfg.head_dim_v, scale)
    h = ops.linear(ops.attend(q, k, v, spec), w["attn_output"], w.get("attn_output.bias"))
    if layer == cfg.n_layers - 1:
        h, x = ops.select(h), ops.select(x)
    x = ops.add(h, x)
    h = ops.rms_norm(x, w["ffn_norm"], cfg.eps)
    gate = ops.linear(h, w["ffn_gate"], w.get("ffn_gate.bias"))
    up = ops.linear(h, w["ffn_up"], w.get("ffn_up.bias"))
    return ops.add(ops.linear(ops.gate(gate, up), w["ffn_down"], w.get("ffn_down.bias")), x)
