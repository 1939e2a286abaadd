"""EmbeddingGemma (arXiv:2509.20354): Gemma 3's blocks, in which tokens also see what follows, for embeddings.

Windows are symmetric: half of one on either side. A file may hold the two dense layers that its authors put after the
pooling; they have neither biases nor an activation, so it is the same to compute them before it, for every token.
"""

from __future__ import annotations

import math

from edgelm.engine.architecture import ModelConfig, sliding_windows
from edgelm.engine.ir import EncodeSpec
from edgelm.engine.ops import Ops, Tensor, Weights
from edgelm.errors import UnsupportedModel
from edgelm_models.parts import between_norms, encodes_both_ways, gemma_heads, inverse_sqrt

ARCHITECTURES = ("gemma-embedding",)

_PERIOD = 6  # every sixth layer sees everything


def record(ops: Ops, w: Weights, cfg: ModelConfig) -> Tensor:
    encodes_both_ways(cfg)
    x = ops.scale(ops.embed(w["token_embd"]), math.sqrt(cfg.n_embd))
    window = cfg.meta.int("attention.sliding_window", least=1)
    for layer, its_window in enumerate(sliding_windows(cfg, _PERIOD, window)):
        x = block(ops, w.block(layer), x, layer, its_window, cfg)
    x = ops.rms_norm(ops.select(x), w["output_norm"], cfg.eps)
    for name in ("dense_2", "dense_3"):
        x = dense(ops, w, x, name, cfg)
    return x


def block(ops: Ops, w: Weights, x: Tensor, layer: int, window: int, cfg: ModelConfig) -> Tensor:
    q, k, v = gemma_heads(ops, w, x, layer, window, cfg)
    q = ops.scale(q, inverse_sqrt(cfg.head_dim_k))
    spec = EncodeSpec(cfg.n_heads[layer], cfg.n_kv_heads[layer], cfg.head_dim_k, cfg.head_dim_v, 1.0, window)
    h = ops.linear(ops.encode(q, k, v, spec), w["attn_output"])
    return between_norms(ops, w, h, x, cfg)


def dense(ops: Ops, w: Weights, x: Tensor, name: str, cfg: ModelConfig) -> Tensor:
    """Return `x` through the dense layer called `name`, if the file speaks of it.

    Raises `UnsupportedModel` if the file has only its tensor, only its widths, or others than the tensor's.
    """
    if name not in w and not any(cfg.meta.has(f"{name}_feat_{end}") for end in ("in", "out")):
        return x
    widths = tuple(cfg.meta.int(f"{name}_feat_{end}") for end in ("in", "out"))
    matrix = w[name]
    if widths != (matrix.width, matrix.rows):
        raise UnsupportedModel(
            f"tensor {matrix.tensor!r} is {matrix.width} x {matrix.rows}, but the file says {widths[0]} x {widths[1]}; "
            "convert the model again"
        )
    return ops.linear(x, matrix)
