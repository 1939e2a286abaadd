"""SmolLM3: Llama's block, and in every fourth layer no positions at all (NoPE, arXiv:2501.18795)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgelm.engine.architecture import ModelConfig, rope_spec
from edgelm.engine.ir import AttendSpec
from edgelm.engine.ops import Ops, Tensor, Weights
from edgelm.errors import UnsupportedModel
from edgelm_models.parts import feed_forward, inverse_sqrt, qkv

if TYPE_CHECKING:
    from edgelm.engine.translation import Config, Translation

ARCHITECTURES = ("smollm3",)
MODEL_TYPES = ("smollm3",)

_NO_ROPE_PERIOD = 4


def record(ops: Ops, w: Weights, cfg: ModelConfig) -> Tensor:
    x = ops.embed(w["token_embd"])
    for layer in range(cfg.n_layers):
        x = block(ops, w.block(layer), x, layer, cfg)
    x = ops.rms_norm(x, w["output_norm"], cfg.eps)
    return ops.linear(x, w.get("output") or w["token_embd"])


def block(ops: Ops, w: Weights, x: Tensor, layer: int, cfg: ModelConfig) -> Tensor:
    n_heads, n_kv_heads = cfg.n_heads[layer], cfg.n_kv_heads[layer]
    h = ops.rms_norm(x, w["attn_norm"], cfg.eps)
    q, k, v = qkv(ops, w, h, layer, cfg)
    if (layer + 1) % _NO_ROPE_PERIOD:
        q = ops.rope(q, rope_spec(cfg, n_heads, neox=False))
        k = ops.rope(k, rope_spec(cfg, n_kv_heads, neox=False))
    spec = AttendSpec(layer, n_heads, n_kv_heads, cfg.head_dim_k, cfg.head_dim_v, inverse_sqrt(cfg.head_dim_k))
    h = ops.linear(ops.attend(q, k, v, spec), w["attn_output"])
    if layer == cfg.n_layers - 1:
        h, x = ops.select(h), ops.select(x)
    x = ops.add(h, x)
    h = ops.rms_norm(x, w["ffn_norm"], cfg.eps)
    return ops.add(feed_forward(ops, w, h), x)


def from_config(config: Config) -> Translation:
    from edgelm.engine.translation import Translation
    from edgelm_models import configs

    configs.no_windows(config)
    metadata = configs.common(config)
    keys, vectors = configs.rope(config, neox_differs=True)
    usual = [int((layer + 1) % _NO_ROPE_PERIOD != 0) for layer in range(metadata["block_count"])]
    if config.metadata.get("no_rope_layers", usual) != usual or config.int("no_rope_layer_interval", 4) != 4:
        raise UnsupportedModel(f"{config.path}: other layers without positions than every fourth are not supported")
    return Translation(metadata | keys, configs.NAMES, vectors)
