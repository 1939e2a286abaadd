"""What an architecture file is, what it can read of a model's metadata, and how its model is recorded.

An architecture is a module with `ARCHITECTURES` (names as in `general.architecture`) and
`record(ops, weights, config) -> Tensor`, which returns the logits. It is registered under the entry point
`edgelm.architectures`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

from edgelm.engine.ir import RopeSpec, Trace
from edgelm.engine.ops import Ops, Tensor, Weights
from edgelm.errors import UnsupportedModel
from edgelm.files.gguf import ModelFile
from edgelm.files.meta import Meta


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The numbers that most architectures share, under GGUF's names. `meta` has the rest.

    `n_context` is what the caller asked for, `n_context_train` what the file was made for.
    """

    meta: Meta
    n_context: int
    n_context_train: int
    n_layers: int
    n_embd: int
    n_heads: tuple[int, ...]
    n_kv_heads: tuple[int, ...]
    head_dim_k: int
    head_dim_v: int
    eps: float
    rope_dims: int
    rope_base: float


class Architecture(Protocol):
    ARCHITECTURES: tuple[str, ...]

    def record(self, ops: Ops, w: Weights, cfg: ModelConfig) -> Tensor:
        """Record the whole model, in pass order, and return the logits."""


def read_config(meta: Meta, n_context: int) -> ModelConfig:
    """Read the common numbers. Raises `UnsupportedModel` if one is missing or absurd."""
    n_layers = meta.int("block_count")
    n_embd = meta.int("embedding_length")
    n_heads = meta.ints("attention.head_count", n_layers)
    n_kv_heads = meta.ints("attention.head_count_kv", n_layers, default=n_heads)
    if any(heads <= 0 or kv <= 0 or heads % kv for heads, kv in zip(n_heads, n_kv_heads, strict=True)):
        raise UnsupportedModel(f"{n_heads[0]} attention heads over {n_kv_heads[0]} key-value heads do not divide")
    head_dim = meta.int("attention.key_length", default=n_embd // n_heads[0])
    return ModelConfig(
        meta=meta,
        n_context=n_context,
        n_context_train=meta.int("context_length"),
        n_layers=n_layers,
        n_embd=n_embd,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim_k=head_dim,
        head_dim_v=meta.int("attention.value_length", default=head_dim),
        eps=meta.float("attention.layer_norm_rms_epsilon"),
        rope_dims=meta.int("rope.dimension_count", default=head_dim),
        rope_base=meta.float("rope.freq_base", default=10000.0),
    )


def rope_spec(cfg: ModelConfig, n_heads: int, *, neox: bool, base: float | None = None, scaled: bool = True) -> RopeSpec:
    """Return the rotary embedding that the file asks for: none, linear, or YaRN scaling, or factors (llama3, longrope).

    `scaled=False` leaves linear scaling out (Gemma's sliding layers). The YaRN magnitude follows llama.cpp: the kernel
    multiplies by `1 + 0.1 ln(1 / freq_scale)`, so files that state their own magnitude have it divided out here.
    """
    meta = cfg.meta
    kind = meta.str("rope.scaling.type", default="none")
    if kind not in ("none", "linear", "yarn", "longrope"):
        raise UnsupportedModel(f"rope scaling {kind!r} is not supported (supported: none, linear, yarn, longrope)")
    factor = meta.float("rope.scaling.factor", default=0.0) or meta.float("rope.scale_linear", default=0.0)
    freq_scale = 1.0 / factor if factor and kind != "none" and scaled else 1.0
    attn_factor = meta.float("rope.scaling.attn_factor", default=1.0)
    n_ctx_orig = meta.int("rope.scaling.original_context_length", default=cfg.n_context_train)
    ext_factor = 0.0
    if kind == "yarn" and scaled:
        ext_factor = meta.float("rope.scaling.yarn_ext_factor", default=1.0)
        log_multiplier = meta.float("rope.scaling.yarn_log_multiplier", default=0.0)
        if log_multiplier and factor > 1:  # DeepSeek's form: magnitudes of q and k scaled apart
            attn_factor *= (1 + 0.1 * log_multiplier * math.log(factor)) / (1 + 0.1 * math.log(factor))
    return RopeSpec(
        n_heads=n_heads,
        n_dims=cfg.rope_dims,
        neox=neox,
        base=cfg.rope_base if base is None else base,
        freq_scale=freq_scale,
        ext_factor=ext_factor,
        attn_factor=attn_factor,
        beta_fast=meta.float("rope.scaling.yarn_beta_fast", default=32.0),
        beta_slow=meta.float("rope.scaling.yarn_beta_slow", default=1.0),
        n_ctx_orig=n_ctx_orig,
    )


def record(architecture: Architecture, model: ModelFile, n_context: int) -> Trace:
    """Record the model of a file. Raises `UnsupportedModel` if tensors are missing or shapes do not fit."""
    cfg = read_config(Meta(model.metadata), n_context)
    ops = Ops()
    logits = architecture.record(ops, Weights(model.tensors), cfg)
    if logits.per != "output":
        raise UnsupportedModel(f"architecture {model.architecture!r} does not select the rows of its logits")
    return ops.trace(logits)
