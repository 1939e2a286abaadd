"""Gemma 2 (arXiv:2408.00118): norms around both halves, soft caps, every second layer slides."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from edgelm.engine.architecture import ModelConfig, rope_spec, sliding_windows
from edgelm.engine.ir import AttendSpec
from edgelm.engine.ops import Ops, Tensor, Weights
from edgelm_models.parts import between_norms, inverse_sqrt, qkv

if TYPE_CHECKING:
    from edgelm.engine.translation import Config, Translation

ARCHITECTURES = ("gemma2",)
MODEL_TYPES = ("gemma2",)

_PERIOD = 2  # every second layer sees everything
_WINDOW = 4096
_ATTENTION_CAP = 50.0
_FINAL_CAP = 30.0
_LAYERS_27B = 46


def record(ops: Ops, w: Weights, cfg: ModelConfig) -> Tensor:
    x = ops.scale(ops.embed(w["token_embd"]), math.sqrt(cfg.n_embd))
    for layer, window in enumerate(sliding_windows(cfg, _PERIOD, _WINDOW)):
        x = block(ops, w.block(layer), x, layer, window, cfg)
    x = ops.rms_norm(x, w["output_norm"], cfg.eps)
    cap = cfg.meta.float("final_logit_softcapping", default=_FINAL_CAP, least=1e-3)
    return ops.softcap(ops.linear(x, w["token_embd"]), cap)


def block(ops: Ops, w: Weights, x: Tensor, layer: int, window: int, cfg: ModelConfig) -> Tensor:
    n_heads, n_kv_heads = cfg.n_heads[layer], cfg.n_kv_heads[layer]
    base = cfg.meta.float("rope.freq_base_swa", default=cfg.rope_base, least=1.0) if window else cfg.rope_base
    cap = cfg.meta.float("attn_logit_softcapping", default=_ATTENTION_CAP, least=1e-3)
    # the 27B model scales by its width per head, all others by the head's own
    per_head = cfg.n_embd // n_heads if cfg.n_layers == _LAYERS_27B else cfg.head_dim_k
    h = ops.rms_norm(x, w["attn_norm"], cfg.eps)
    q, k, v = qkv(ops, w, h, layer, cfg)
    q = ops.rope(q, rope_spec(cfg, n_heads, neox=True, base=base))
    k = ops.rope(k, rope_spec(cfg, n_kv_heads, neox=True, base=base))
    q = ops.scale(q, inverse_sqrt(per_head))
    spec = AttendSpec(layer, n_heads, n_kv_heads, cfg.head_dim_k, cfg.head_dim_v, 1.0, softcap=cap, window=window)
    h = ops.linear(ops.attend(q, k, v, spec), w["attn_output"])
    if layer == cfg.n_layers - 1:
        h, x = ops.select(h), ops.select(x)
    return between_norms(ops, w, h, x, cfg)


def from_config(config: Config) -> Translation:
    from edgelm.engine.translation import Translation
    from edgelm_models import configs

    metadata = configs.common(config.with_defaults({"head_dim": 256}), "gelu_pytorch_tanh")
    keys, vectors = configs.rope(config)
    n_heads, wide = metadata["attention.head_count"], metadata["block_count"] == _LAYERS_27B
    per_head = metadata["embedding_length"] // n_heads if wide else metadata["attention.key_length"]
    configs.same_scale(config, per_head)
    caps = {
        "attn_logit_softcapping": config.float("attn_logit_softcapping", least=1e-3),
        "final_logit_softcapping": config.float("final_logit_softcapping", least=1e-3),
    }
    metadata |= keys | caps | configs.windows(config.with_defaults({"sliding_window": _WINDOW}), _PERIOD)
    return Translation(metadata, configs.NAMES | configs.POST_NORMS, vectors, norm_plus=1.0)
