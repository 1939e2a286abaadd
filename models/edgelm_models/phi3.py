"""Phi-3, Phi-3.5 and Phi-4 mini (arXiv:2404.14219, 2503.01743): fused q, k, v, fused gate and up, longrope.

The sliding window that some of the files state is not applied, as in llama.cpp.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgelm.engine.architecture import ModelConfig, rope_factors, rope_spec
from edgelm.engine.ir import AttendSpec
from edgelm.engine.ops import Ops, Tensor, Weights
from edgelm_models.parts import inverse_sqrt, qkv

if TYPE_CHECKING:
    from edgelm.engine.translation import Config, Translation

ARCHITECTURES = ("phi3",)
MODEL_TYPES = ("phi3",)


def record(ops: Ops, w: Weights, cfg: ModelConfig) -> Tensor:
    x = ops.embed(w["token_embd"])
    for layer in range(cfg.n_layers):
        x = block(ops, w, x, layer, cfg)
    x = ops.rms_norm(x, w["output_norm"], cfg.eps)
    return ops.linear(x, w.get("output") or w["token_embd"])


def block(ops: Ops, model: Weights, x: Tensor, layer: int, cfg: ModelConfig) -> Tensor:
    w, n_heads, n_kv_heads = model.block(layer), cfg.n_heads[layer], cfg.n_kv_heads[layer]
    factors = rope_factors(model, cfg)
    h = ops.rms_norm(x, w["attn_norm"], cfg.eps)
    q, k, v = qkv(ops, w, h, layer, cfg)
    q = ops.rope(q, rope_spec(cfg, n_heads, neox=True), factors)
    k = ops.rope(k, rope_spec(cfg, n_kv_heads, neox=True), factors)
    q = ops.scale(q, inverse_sqrt(cfg.head_dim_k))
    spec = AttendSpec(layer, n_heads, n_kv_heads, cfg.head_dim_k, cfg.head_dim_v, 1.0)
    h = ops.linear(ops.attend(q, k, v, spec), w["attn_output"])
    if layer == cfg.n_layers - 1:
        h, x = ops.select(h), ops.select(x)
    x = ops.add(h, x)
    h = ops.linear(ops.rms_norm(x, w["ffn_norm"], cfg.eps), w["ffn_up"])  # gate and up side by side
    half = h.width // 2
    h = ops.gate(ops.slice(h, 0, half), ops.slice(h, half, half))
    return ops.add(x, ops.linear(h, w["ffn_down"]))


def from_config(config: Config) -> Translation:
    from edgelm.engine.translation import Translation
    from edgelm_models import configs

    keys, vectors = configs.rope(config)
    fused = {"self_attn.qkv_proj": "attn_qkv", "mlp.gate_up_proj": "ffn_up"}
    return Translation(configs.common(config) | keys, configs.NAMES | fused, vectors)
