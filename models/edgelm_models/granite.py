"""Granite 3 and 4, dense: Llama's block with four multipliers: embedding, residual, attention, logits."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgelm.engine.architecture import ModelConfig, rope_factors, rope_spec
from edgelm.engine.ir import AttendSpec
from edgelm.engine.ops import Ops, Tensor, Weights
from edgelm.errors import UnsupportedModel
from edgelm_models.parts import feed_forward, inverse_sqrt, qkv

if TYPE_CHECKING:
    from edgelm.engine.translation import Config, Translation

ARCHITECTURES = ("granite",)
MODEL_TYPES = ("granite",)


def record(ops: Ops, w: Weights, cfg: ModelConfig) -> Tensor:
    if cfg.meta.has("deepstack_mapping"):
        raise UnsupportedModel("Granite Vision is not supported; try a text model of the family")
    x = ops.embed(w["token_embd"])
    if embedding_scale := cfg.meta.float("embedding_scale", default=0.0):
        x = ops.scale(x, embedding_scale)
    for layer in range(cfg.n_layers):
        x = block(ops, w, x, layer, cfg)
    x = ops.rms_norm(x, w["output_norm"], cfg.eps)
    logits = ops.linear(x, w.get("output") or w["token_embd"])
    return ops.scale(logits, 1.0 / cfg.meta.float("logit_scale", least=1e-6))


def block(ops: Ops, model: Weights, x: Tensor, layer: int, cfg: ModelConfig) -> Tensor:
    w, n_heads, n_kv_heads = model.block(layer), cfg.n_heads[layer], cfg.n_kv_heads[layer]
    residual_scale = cfg.meta.float("residual_scale", default=0.0) or 1.0
    h = ops.rms_norm(x, w["attn_norm"], cfg.eps)
    q, k, v = qkv(ops, w, h, layer, cfg)
    if cfg.meta.bool("rope.scaling.finetuned", default=True):  # Granite says with it whether there are positions
        factors = rope_factors(model, cfg)
        q = ops.rope(q, rope_spec(cfg, n_heads, neox=False), factors)
        k = ops.rope(k, rope_spec(cfg, n_kv_heads, neox=False), factors)
    scale = cfg.meta.float("attention.scale", default=0.0) or inverse_sqrt(cfg.head_dim_k)
    spec = AttendSpec(layer, n_heads, n_kv_heads, cfg.head_dim_k, cfg.head_dim_v, scale)
    h = ops.linear(ops.attend(q, k, v, spec), w["attn_output"], w.get("attn_output.bias"))
    if layer == cfg.n_layers - 1:
        h, x = ops.select(h), ops.select(x)
    x = ops.add(ops.scale(h, residual_scale), x)
    h = feed_forward(ops, w, ops.rms_norm(x, w["ffn_norm"], cfg.eps))
    return ops.add(ops.scale(h, residual_scale), x)


def from_config(config: Config) -> Translation:
    from edgelm.engine.translation import Translation
    from edgelm_models import configs

    configs.no_windows(config)
    keys, vectors = configs.rope(config, neox_differs=True)
    scales = {
        "embedding_scale": config.float("embedding_multiplier", 1.0),
        "residual_scale": config.float("residual_multiplier", 1.0),
        "attention.scale": config.float("attention_multiplier", 1.0),
        "logit_scale": config.float("logits_scaling", 1.0),
    }
    return Translation(configs.common(config) | keys | scales, configs.NAMES, vectors)
