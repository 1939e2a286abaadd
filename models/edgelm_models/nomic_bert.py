"""Nomic's BERT, for embeddings (nomic-embed-text, arXiv:2402.01613): rotary positions and a gated network."""

from __future__ import annotations

from edgelm.engine.architecture import ModelConfig, rope_spec
from edgelm.engine.ir import EncodeSpec
from edgelm.engine.ops import Ops, Tensor, Weights
from edgelm_models.parts import encodes_both_ways, feed_forward, inverse_sqrt, qkv

ARCHITECTURES = ("nomic-bert",)


def record(ops: Ops, w: Weights, cfg: ModelConfig) -> Tensor:
    encodes_both_ways(cfg)
    x = ops.embed(w["token_embd"])
    if "token_types" in w:
        x = ops.add_row(x, w["token_types"])
    x = ops.layer_norm(x, w["token_embd_norm"], w["token_embd_norm.bias"], cfg.eps)
    for layer in range(cfg.n_layers):
        x = block(ops, w.block(layer), x, layer, cfg)
    return ops.select(x)


def block(ops: Ops, w: Weights, x: Tensor, layer: int, cfg: ModelConfig) -> Tensor:
    n_heads, n_kv_heads = cfg.n_heads[layer], cfg.n_kv_heads[layer]
    q, k, v = qkv(ops, w, x, layer, cfg)
    q = ops.rope(q, rope_spec(cfg, n_heads, neox=True))
    k = ops.rope(k, rope_spec(cfg, n_kv_heads, neox=True))
    spec = EncodeSpec(n_heads, n_kv_heads, cfg.head_dim_k, cfg.head_dim_v, inverse_sqrt(cfg.head_dim_k))
    h = ops.linear(ops.encode(q, k, v, spec), w["attn_output"], w.get("attn_output.bias"))
    x = ops.layer_norm(ops.add(h, x), w["attn_output_norm"], w["attn_output_norm.bias"], cfg.eps)
    h = feed_forward(ops, w, x)
    return ops.layer_norm(ops.add(h, x), w["layer_output_norm"], w["layer_output_norm.bias"], cfg.eps)
