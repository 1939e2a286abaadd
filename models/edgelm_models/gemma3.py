"""Gemma 3, text (arXiv:2503.19786): norms around both halves, q and k norms, five sliding layers to each full one."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from edgelm.engine.architecture import ModelConfig, sliding_windows
from edgelm.engine.ir import AttendSpec
from edgelm.engine.ops import Ops, Tensor, Weights
from edgelm.errors import UnsupportedModel
from edgelm_models.parts import GEMMA_SLIDING_BASE, between_norms, gemma_heads, inverse_sqrt

if TYPE_CHECKING:
    from edgelm.engine.translation import Config, Translation

ARCHITECTURES = ("gemma3",)
MODEL_TYPES = ("gemma3_text", "gemma3")

_PERIOD = 6  # every sixth layer sees everything
_LAYERS_27B = 62
# what config.json may leave out: the values of transformers' Gemma3TextConfig
_DEFAULTS = {
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1_000_000.0,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
}


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
    # the 27B model scales by its width per head, all others by the head's own
    per_head = cfg.n_embd // n_heads if cfg.n_layers == _LAYERS_27B else cfg.head_dim_k
    q, k, v = gemma_heads(ops, w, x, layer, window, cfg)
    q = ops.scale(q, inverse_sqrt(per_head))
    spec = AttendSpec(layer, n_heads, n_kv_heads, cfg.head_dim_k, cfg.head_dim_v, 1.0, window=window)
    h = ops.linear(ops.attend(q, k, v, spec), w["attn_output"])
    if layer == cfg.n_layers - 1:
        h, x = ops.select(h), ops.select(x)
    return between_norms(ops, w, h, x, cfg)


def from_config(config: Config) -> Translation:
    from edgelm.engine.translation import Translation
    from edgelm_models import configs

    if config.bool("use_bidirectional_attention", False):
        raise UnsupportedModel(
            f"{config.path}: tokens see what follows, as in EmbeddingGemma; edgelm embeds texts with GGUF files only, "
            "use one of those"
        )
    config = config.with_defaults(_DEFAULTS)
    metadata = configs.common(config, "gelu_pytorch_tanh")
    keys, vectors = configs.rope(config)
    n_heads, wide = metadata["attention.head_count"], metadata["block_count"] == _LAYERS_27B
    configs.same_scale(config, metadata["embedding_length"] // n_heads if wide else metadata["attention.key_length"])
    local = configs.rope_part(config, "sliding_attention") if config.has("rope_parameters") else config
    metadata |= keys | configs.windows(config, config.int("sliding_window_pattern", _PERIOD, least=1))
    metadata["rope.freq_base_swa"] = config.float("rope_local_base_freq", local.float("rope_theta", GEMMA_SLIDING_BASE))
    metadata["final_logit_softcapping"] = config.float("final_logit_softcapping", 0.0, least=0.0)
    names = configs.NAMES | configs.HEAD_NORMS | configs.POST_NORMS
    # of a model that sees, only the text is loaded
    return Translation(metadata, names, vectors, norm_plus=1.0, ignored=("vision_tower.", "multi_modal_projector."))
