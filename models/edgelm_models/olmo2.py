"""OLMo 2 and 3 (arXiv:2501.00656): norms only after each half, q and k normed over all heads at once.

OLMo 3 has three sliding layers to each full one; they keep plain positions where the full ones use YaRN.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgelm.engine.architecture import ModelConfig, rope_spec, sliding_windows
from edgelm.engine.ir import AttendSpec, RopeSpec
from edgelm.engine.ops import Ops, Tensor, Weights
from edgelm_models.parts import feed_forward, inverse_sqrt, qkv

if TYPE_CHECKING:
    from edgelm.engine.translation import Config, Translation

ARCHITECTURES = ("olmo2",)
MODEL_TYPES = ("olmo2", "olmo3")

_PERIOD = 4  # every fourth layer sees everything


def record(ops: Ops, w: Weights, cfg: ModelConfig) -> Tensor:
    x = ops.embed(w["token_embd"])
    for layer, window in enumerate(sliding_windows(cfg, _PERIOD)):
        x = block(ops, w.block(layer), x, layer, window, cfg)
    x = ops.rms_norm(x, w["output_norm"], cfg.eps)
    return ops.linear(x, w["output"])


def block(ops: Ops, w: Weights, x: Tensor, layer: int, window: int, cfg: ModelConfig) -> Tensor:
    n_heads, n_kv_heads = cfg.n_heads[layer], cfg.n_kv_heads[layer]
    q, k, v = qkv(ops, w, x, layer, cfg)
    q = ops.rope(ops.rms_norm(q, w["attn_q_norm"], cfg.eps), _rope(cfg, n_heads, window))
    k = ops.rope(ops.rms_norm(k, w["attn_k_norm"], cfg.eps), _rope(cfg, n_kv_heads, window))
    scale = inverse_sqrt(cfg.head_dim_k)
    spec = AttendSpec(layer, n_heads, n_kv_heads, cfg.head_dim_k, cfg.head_dim_v, scale, window=window)
    h = ops.linear(ops.attend(q, k, v, spec), w["attn_output"])
    if layer == cfg.n_layers - 1:
        h, x = ops.select(h), ops.select(x)
    x = ops.add(ops.rms_norm(h, w["post_attention_norm"], cfg.eps), x)
    return ops.add(ops.rms_norm(feed_forward(ops, w, x), w["post_ffw_norm"], cfg.eps), x)


def _rope(cfg: ModelConfig, n_heads: int, window: int) -> RopeSpec:
    spec = rope_spec(cfg, n_heads, neox=True)
    return spec._replace(freq_scale=1.0, ext_factor=0.0, attn_factor=1.0) if window else spec


def from_config(config: Config) -> Translation:
    from edgelm.engine.translation import Translation
    from edgelm_models import configs

    keys, vectors = configs.rope(config)
    if config.str("model_type") == "olmo3":
        keys |= configs.windows(config, _PERIOD)
    names = configs.NAMES | configs.HEAD_NORMS | configs.POST_NORMS
    return Translation(configs.common(config) | keys, names, vectors)
