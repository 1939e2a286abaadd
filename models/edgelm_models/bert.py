"""BERT and what is built like it, for embeddings: all-MiniLM, bge, e5, gte, snowflake-arctic (arXiv:1810.04805).

Norms come after what they normalize; every token sees all others; positions are learned. A text is one sentence: all
its tokens are of the first type.
"""

from __future__ import annotations

from edgelm.engine.architecture import ModelConfig
from edgelm.engine.ops import Ops, Tensor, Weights
from edgelm.errors import ConfigError
from edgelm_models.parts import add_and_norm, attend_both_ways, embed_sentence, encodes_both_ways, qkv

ARCHITECTURES = ("bert",)


def record(ops: Ops, w: Weights, cfg: ModelConfig) -> Tensor:
    encodes_both_ways(cfg)
    positions = w["position_embd"]
    if cfg.n_context > positions.rows:
        raise ConfigError(f"the model knows {positions.rows} positions, not {cfg.n_context}; ask for a shorter context")
    x = ops.add_positions(embed_sentence(ops, w), positions)
    x = ops.layer_norm(x, w["token_embd_norm"], w["token_embd_norm.bias"], cfg.eps)
    for layer in range(cfg.n_layers):
        x = block(ops, w.block(layer), x, layer, cfg)
    return ops.select(x)


def block(ops: Ops, w: Weights, x: Tensor, layer: int, cfg: ModelConfig) -> Tensor:
    q, k, v = qkv(ops, w, x, layer, cfg)
    h = attend_both_ways(ops, w, q, k, v, layer, cfg)
    x = add_and_norm(ops, w, h, x, "attn_output_norm", cfg)
    up = ops.activate(ops.linear(x, w["ffn_up"], w.get("ffn_up.bias")), "gelu")
    h = ops.linear(up, w["ffn_down"], w.get("ffn_down.bias"))
    return add_and_norm(ops, w, h, x, "layer_output_norm", cfg)
