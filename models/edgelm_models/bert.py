"""BERT and what is built like it, for embeddings: all-MiniLM, bge, e5, gte, snowflake-arctic (arXiv:1810.04805).

Norms come after what they normalize; every token sees all others; positions are learned. A text is one sentence: all
its tokens are of the first type.
"""

from __future__ import annotations

from edgelm.engine.architecture import ModelConfig
from edgelm.engine.ir import EncodeSpec
from edgelm.engine.ops import Ops, Tensor, Weights
from edgelm.errors import ConfigError
from edgelm_models.parts import encodes_both_ways, inverse_sqrt, qkv

ARCHITECTURES = ("bert",)


def record(ops: Ops, w: Weights, cfg: ModelConfig) -> Tensor:
    encodes_both_ways(cfg)
    positions = w["position_embd"]
    if cfg.n_context > positions.rows:
        raise ConfigError(f"the model knows {positions.rows} positions, not {cfg.n_context}; ask for a shorter context")
    x = ops.embed(w["token_embd"])
    if "token_types" in w:
        x = ops.add_row(x, w["token_types"])
    x = ops.add_positions(x, positions)
    x = ops.layer_norm(x, w["token_embd_norm"], w["token_embd_norm.bias"], cfg.eps)
    for layer in range(cfg.n_layers):
        x = block(ops, w.block(layer), x, layer, cfg)
    return ops.select(x)


def block(ops: Ops, w: Weights, x: Tensor, layer: int, cfg: ModelConfig) -> Tensor:
    n_heads, n_kv_heads = cfg.n_heads[layer], cfg.n_kv_heads[layer]
    q, k, v = qkv(ops, w, x, layer, cfg)
    spec = EncodeSpec(n_heads, n_kv_heads, cfg.head_dim_k, cfg.head_dim_v, inverse_sqrt(cfg.head_dim_k))
    h = ops.linear(ops.encode(q, k, v, spec), w["attn_output"], w.get("attn_output.bias"))
    x = ops.layer_norm(ops.add(h, x), w["attn_output_norm"], w["attn_output_norm.bias"], cfg.eps)
    up = ops.activate(ops.linear(x, w["ffn_up"], w.get("ffn_up.bias")), "gelu")
    h = ops.linear(up, w["ffn_down"], w.get("ffn_down.bias"))
    return ops.layer_norm(ops.add(h, x), w["layer_output_norm"], w["layer_output_norm.bias"], cfg.eps)
