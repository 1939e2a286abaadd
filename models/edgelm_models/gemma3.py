"""Gemma 3, text (arXiv:2503.19786): norms around both halves, q and k norms, five sliding layers to each full one."""

from __future__ import annotations

import math

from edgelm.engine.architecture import ModelConfig, rope_spec, sliding_windows
from edgelm.engine.ir import AttendSpec
from edgelm.engine.ops import Ops, Tensor, Weights
from edgelm_models.parts import feed_forward, inverse_sqrt, qkv

ARCHITECTURES = ("gemma3",)

_PERIOD = 6  # every sixth layer sees everything
_SLIDING_BASE = 10000.0
_LAYERS_27B = 62


def record(ops: Ops, w: Weights, cfg: ModelConfig) -> Tensor:
    x = ops.scale(ops.embed(w["token_embd"]), math.sqrt(cfg.n_embd))
    for layer, window in enumerate(sliding_windows(cfg, _PERIOD)):
        x = block(ops, w.block(layer), x, layer, window, cfg)
    x = ops.rms_norm(x, w["output_norm"], cfg.eps)
    logits = ops.linear(x, w.get("output") or w["token_embd"])
    cap = cfg.meta.float("final_logit_softcapping", default=0.0, least=0.0)
    return ops.softcap(logits, cap) if cap else logits


def block(ops: Ops, w: Weights, x: Tensor, layer: int, window: int, cfg: ModelConfig) -> Tensor:
    n_heads, n_kv_heads = cfg.n_heads[layer], cfg.n_kv_heads[layer]
    sliding = window > 0  # such layers keep plain positions however far the others are stretched
    base = cfg.meta.float("rope.freq_base_swa", default=_SLIDING_BASE, least=1.0) if sliding else cfg.rope_base
    # the 27B model scales by its width per head, all others by the head's own
    per_head = cfg.n_embd // n_heads if cfg.n_layers == _LAYERS_27B else cfg.head_dim_k
    h = ops.rms_norm(x, w["attn_norm"], cfg.eps)
    q, k, v = qkv(ops, w, h, layer, cfg)
    q = ops.rms_norm(q, w["attn_q_norm"], cfg.eps, groups=n_heads)
    q = ops.rope(q, rope_spec(cfg, n_heads, neox=True, base=base, scaled=not sliding))
    k = ops.rms_norm(k, w["attn_k_norm"], cfg.eps, groups=n_kv_heads)
    k = ops.rope(k, rope_spec(cfg, n_kv_heads, neox=True, base=base, scaled=not sliding))
    q = ops.scale(q, inverse_sqrt(per_head))
    spec = AttendSpec(layer, n_heads, n_kv_heads, cfg.head_dim_k, cfg.head_dim_v, 1.0, window=window)
    h = ops.linear(ops.attend(q, k, v, spec), w["attn_output"])
    if layer == cfg.n_layers - 1:
        h, x = ops.select(h), ops.select(x)
    x = ops.add(ops.rms_norm(h, w["post_attention_norm"], cfg.eps), x)
    h = feed_forward(ops, w, ops.rms_norm(x, w["ffn_norm"], cfg.eps), "gelu")
    return ops.add(ops.rms_norm(h, w["post_ffw_norm"], cfg.eps), x)
