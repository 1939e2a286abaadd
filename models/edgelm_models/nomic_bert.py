"""Nomic's BERT, for embeddings (nomic-embed-text, arXiv:2402.01613): rotary positions and a gated network."""

from __future__ import annotations

from edgelm.engine.architecture import ModelConfig, rope_spec
from edgelm.engine.ops import Ops, Tensor, Weights
from edgelm_models.parts import add_and_norm, attend_both_ways, embed_sentence, encodes_both_ways, feed_forward, qkv

ARCHITECTURES = ("nomic-bert",)


def record(ops: Ops, w: Weights, cfg: ModelConfig) -> Tensor:
    encodes_both_ways(cfg)
    x = ops.layer_norm(embed_sentence(ops, w), w["token_embd_norm"], w["token_embd_norm.bias"], cfg.eps)
    for layer in range(cfg.n_layers):
        x = block(ops, w.block(layer), x, layer, cfg)
    return ops.select(x)


def block(ops: Ops, w: Weights, x: Tensor, layer: int, cfg: ModelConfig) -> Tensor:
    q, k, v = qkv(ops, w, x, layer, cfg)
    q = ops.rope(q, rope_spec(cfg, cfg.n_heads[layer], neox=True))
    k = ops.rope(k, rope_spec(cfg, cfg.n_kv_heads[layer], neox=True))
    h = attend_both_ways(ops, w, q, k, v, layer, cfg)
    x = add_and_norm(ops, w, h, x, "attn_output_norm", cfg)
    return add_and_norm(ops, w, feed_forward(ops, w, x), x, "layer_output_norm", cfg)
