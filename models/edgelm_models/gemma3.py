"""Gemma 3, text (arXiv:2503.19786): norms around both halves, q and k norms, five sliding layers to each full one."""

from __future__ import annotations

import math

from edgelm.engine.architecture import ModelConfig, rope_spec
from edgelm.engine.ir import AttendSpec
from edgelm.engine.ops import Ops, Tensor, Weights

ARCHITECTURES = ("gemma3",)

_PERIOD = 6  # every sixth layer sees everything
_SLIDING_BASE = 10000.0
_LAYERS_27B = 62


def record(ops: Ops, w: Weights, cfg: ModelConfig) -> Tensor:
    x = ops.scale(ops.embed(w["token_embd"]), math.sqrt(cfg.n_embd))
    for layer in range(cfg.n_layers):
        x = block(ops, w.block(layer), x, layer, cfg)
    x = ops.rms_norm(x, w["output_norm"], cfg.eps)
    logits = ops.linear(x, w.get("output") or w["token_embd"])
    cap = cfg.meta.float("final_logit_softcapping", default=0.0)
    return ops.softcap(logits, cap) if cap else logits


def block(ops: Ops, w: Weights, x: Tensor, layer: int, cfg: ModelConfig) -> Tensor:
    n_heads, n_kv_heads = cfg.n_heads[layer], cfg.n_kv_heads[layer]
    window = cfg.meta.int("attention.sliding_window", default=0)
    period = cfg.meta.int("attention.sliding_window_pattern", default=_PERIOD)
    sliding = window > 0 and (layer + 1) % period != 0
    base = cfg.meta.float("rope.freq_base_swa", default=_SLIDING_BASE) if sliding else cfg.rope_base
    # the 27B model scales by its width per head, all others by the head's own
    per_head = cfg.n_embd // n_heads if cfg.n_layers == _LAYERS_27B else cfg.head_dim_k
    h = ops.rms_norm(x, w["attn_norm"], cfg.eps)
    q, k, v = (ops.linear(h, w[name]) for name in ("attn_q", "attn_k", "attn_v"))
    q = ops.rms_norm(q, w["attn_q_norm"], cfg.eps, groups=n_heads)
    q = ops.rope(q, rope_spec(cfg, n_heads, neox=True, base=base, scaled=not sliding))
    k = ops.rms_norm(k, w["attn_k_norm"], cfg.eps, groups=n_kv_heads)
    k = ops.rope(k, rope_spec(cfg, n_kv_heads, neox=True, base=base, scaled=not sliding))
    q = ops.scale(q, 1 / math.sqrt(per_head))
    spec = AttendSpec(
        layer, n_heads, n_kv_heads, cfg.head_dim_k, cfg.head_dim_v, 1.0, window=window if sliding else 0
    )
    h = ops.linear(ops.attend(q, k, v, spec), w["attn_output"])
    if layer == cfg.n_layers - 1:
        h, x = ops.select(h), ops.select(x)
    x = ops.add(ops.rms_norm(h, w["post_attention_norm"], cfg.eps), x)
    h = ops.rms_norm(x, w["ffn_norm"], cfg.eps)
    h = ops.linear(ops.gate(ops.linear(h, w["ffn_gate"]), ops.linear(h, w["ffn_up"]), "gelu"), w["ffn_down"])
    return ops.add(ops.rms_norm(h, w["post_ffw_norm"], cfg.eps), x)
