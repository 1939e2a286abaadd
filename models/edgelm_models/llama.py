"""Llama and what is built like it: Llama 2 and 3, SmolLM2, TinyLlama, Mistral (arXiv:2302.13971, 2407.21783).

Mistral's sliding window is not applied: files of this architecture attend to the whole context, as in llama.cpp.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgelm.engine.architecture import ModelConfig, rope_factors, rope_spec
from edgelm.engine.ir import AttendSpec
from edgelm.engine.ops import Ops, Tensor, Weights
from edgelm_models.parts import feed_forward, inverse_sqrt, qkv

if TYPE_CHECKING:
    from edgelm.engine.translation import Config, Translation

ARCHITECTURES = ("llama",)
MODEL_TYPES = ("llama", "mistral")


def record(ops: Ops, w: Weights, cfg: ModelConfig) -> Tensor:
    x = ops.embed(w["token_embd"])
    for layer in range(cfg.n_layers):
        x = block(ops, w, x, layer, cfg)
    x = ops.rms_norm(x, w["output_norm"], cfg.eps)
    return ops.linear(x, w.get("output") or w["token_embd"])


def block(ops: Ops, model: Weights, x: Tensor, layer: int, cfg: ModelConfig) -> Tensor:
    w, n_heads, n_kv_heads = model.block(layer), cfg.n_heads[layer], cfg.n_kv_heads[layer]
    factors = rope_factors(model, cfg)  # Llama 3.1 and later
    h = ops.rms_norm(x, w["attn_norm"], cfg.eps)
    q, k, v = qkv(ops, w, h, layer, cfg)
    q = ops.rope(q, rope_spec(cfg, n_heads, neox=False), factors)
    k = ops.rope(k, rope_spec(cfg, n_kv_heads, neox=False), factors)
    spec = AttendSpec(layer, n_heads, n_kv_heads, cfg.head_dim_k, cfg.head_dim_v, inverse_sqrt(cfg.head_dim_k))
    h = ops.linear(ops.attend(q, k, v, spec), w["attn_output"], w.get("attn_output.bias"))
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
    # GGUF files of this architecture have no windows: as far as one reaches, the answers are the same
    metadata["context_length"] = min(metadata["context_length"], config.int("sliding_window", 2**31 - 1, least=1))
    keys, vectors = configs.rope(config, neox_differs=True)
    return Translation(metadata | keys, configs.NAMES, vectors)
