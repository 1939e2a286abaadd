"""What the config.json of most architectures have in common, in GGUF's terms.

Imported only when a folder is loaded.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from edgelm.engine.architecture import MAX_EMBD, MAX_HEADS, MAX_LAYERS
from edgelm.errors import UnsupportedModel

if TYPE_CHECKING:
    from edgelm.files.folder import Config

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
HEAD_NORMS = {"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"}
POST_NORMS = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
_BETAS = {"beta_fast": 32.0, "beta_slow": 1.0}


def common(config: Config, activation: str = "silu") -> dict[str, Any]:
    """Return the keys that all architectures share, those of the rotary embedding apart."""
    found = config.str("hidden_activation", config.str("hidden_act", activation))
    if found != activation:
        raise UnsupportedModel(f"{config.path}: activation {found!r} is not supported for this model_type")
    n_heads, n_embd = config.int("num_attention_heads", least=1, most=MAX_HEADS), config.int("hidden_size", least=1)
    head_dim = config.int("head_dim", n_embd // n_heads, least=1, most=MAX_EMBD)
    rotated = rope_part(config).float("partial_rotary_factor", 1.0, least=0.0, most=1.0)
    return {
        "block_count": config.int("num_hidden_layers", least=1, most=MAX_LAYERS),
        "context_length": config.int("max_position_embeddings", least=1),
        "embedding_length": n_embd,
        "feed_forward_length": config.int("intermediate_size", least=1),
        "attention.head_count": n_heads,
        "attention.head_count_kv": config.int("num_key_value_heads", n_heads, least=1),
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "attention.layer_norm_rms_epsilon": config.float("rms_norm_eps", least=0.0),
        "rope.dimension_count": int(head_dim * rotated),
    }


def rope_part(config: Config, layer_type: str = "full_attention") -> Config:
    """Return what is said of the rotary embedding: `rope_parameters`, or `rope_scaling` with what lies beside it."""
    if config.has("rope_parameters"):
        part = config.part("rope_parameters")
        part = part.part(layer_type) if part.has(layer_type) else part
    else:
        part = config.part("rope_scaling")
    beside = {key: config.metadata[key] for key in ("rope_theta", "partial_rotary_factor") if config.has(key)}
    return part.with_defaults(beside)


def rope(config: Config, *, neox_differs: bool = False) -> tuple[dict[str, Any], dict[str, list[float]]]:
    """Return the keys of the rotary embedding and the tensor of factors, if it needs one.

    `neox_differs`: GGUF files of the architecture have the rotated pairs side by side. Folders never do.
    """
    part = rope_part(config)
    keys: dict[str, Any] = {"rope.freq_base": part.float("rope_theta", 10_000.0, least=1.0)}
    if neox_differs:
        keys["rope.neox"] = True
    kind = part.str("rope_type", part.str("type", "default"))
    if kind == "default":
        return keys, {}
    if kind == "llama3":
        return keys, {"rope_freqs.weight": _llama3_factors(config, part, keys["rope.freq_base"])}
    if kind == "longrope" or kind == "su":
        return _longrope(config, part, keys)
    factor = part.float("factor", least=1.0)
    if kind == "linear":
        return keys | {"rope.scaling.type": "linear", "rope.scaling.factor": factor}, {}
    if kind == "yarn":
        return keys | _yarn(config, part, factor), {}
    raise UnsupportedModel(
        f"{config.path}: rope scaling {kind!r} is not supported (default, linear, llama3, yarn, longrope)"
    )


def _original_context(config: Config, part: Config) -> int:
    key = "original_max_position_embeddings"
    return part.int(key, config.int(key, config.int("max_position_embeddings"), least=2), least=2)


def _llama3_factors(config: Config, part: Config, base: float) -> list[float]:
    """Return the divisors of the frequencies: 1 for fast ones, `factor` for slow ones (arXiv:2407.21783)."""
    n_dims = common(config)["rope.dimension_count"]
    factor, original = part.float("factor", least=1.0), _original_context(config, part)
    low, high = part.float("low_freq_factor", 1.0, least=0.0), part.float("high_freq_factor", 4.0, least=0.0)
    if not low < high:
        raise UnsupportedModel(f"{config.path}: high_freq_factor {high:g} is not above low_freq_factor {low:g}")
    factors = []
    for place in range(0, n_dims, 2):
        turns = original * base ** (-place / n_dims) / (2 * math.pi)
        smooth = min(max((turns - low) / (high - low), 0.0), 1.0)
        factors.append(1.0 / ((1.0 - smooth) / factor + smooth))
    return factors


def _yarn(config: Config, part: Config, factor: float) -> dict[str, Any]:
    for key, value in _BETAS.items():
        if part.float(key, value) != value:
            raise UnsupportedModel(f"{config.path}: YaRN with another {key} than {value:g} is not supported")
    if part.has("mscale") or part.has("mscale_all_dim") or not part.bool("truncate", True):
        raise UnsupportedModel(f"{config.path}: this form of YaRN (mscale, truncate) is not supported")
    usual = 1.0 + 0.1 * math.log(factor)
    return {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": factor,
        "rope.scaling.attn_factor": part.float("attention_factor", usual, least=1e-3) / usual,
        "rope.scaling.original_context_length": _original_context(config, part),
    }


def _longrope(config: Config, part: Config, keys: dict[str, Any]) -> tuple[dict[str, Any], dict[str, list[float]]]:
    original = _original_context(config, part)
    stretch = config.int("max_position_embeddings") / original
    stretched = math.sqrt(1 + math.log(stretch) / math.log(original)) if stretch > 1 else 1.0
    keys = keys | {
        "rope.scaling.type": "longrope",
        "rope.scaling.attn_factor": part.float("attention_factor", stretched, least=1e-3),
        "rope.scaling.original_context_length": original,
    }
    sets = {f"rope_factors_{name}.weight": list(part.numbers(f"{name}_factor")) for name in ("long", "short")}
    return keys, sets


def no_windows(config: Config) -> None:
    """Raise `UnsupportedModel` if the config asks for sliding windows, where the architecture has none."""
    if config.bool("use_sliding_window", False) or "sliding_attention" in config.strings("layer_types"):
        raise UnsupportedModel(f"{config.path}: sliding windows are not supported for this model_type")


def windows(config: Config, period: int) -> dict[str, Any]:
    """Return which layers slide, and over how many tokens; without a list every `period`-th sees everything."""
    layers = config.strings("layer_types")
    window = {"attention.sliding_window": config.int("sliding_window", least=1)}
    if not layers:
        return window | {"attention.sliding_window_pattern": period}
    return window | {"attention.sliding_window_pattern": np.array([kind == "sliding_attention" for kind in layers])}


def same_scale(config: Config, per_head: int) -> None:
    """Raise `UnsupportedModel` unless scores are divided by the root of `per_head`, as GGUF files imply."""
    if config.float("query_pre_attn_scalar", float(per_head)) != per_head:
        raise UnsupportedModel(f"{config.path}: a query_pre_attn_scalar other than {per_head} is not supported")
