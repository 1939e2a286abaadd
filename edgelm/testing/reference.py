"""The operations in float64, each written the way its paper has it. For comparing backends; speed does not matter."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgelm.engine.ir import Activation, AttendSpec, EncodeSpec, RopeSpec

Exact = NDArray[np.float64]


def nmse(ours: NDArray[np.float32], expected: Exact) -> float:
    """Normalized mean squared error; raises if shapes differ or a number is not finite."""
    assert ours.shape == expected.shape
    assert np.isfinite(ours).all()
    return float(np.square(ours - expected).sum() / max(np.square(expected).sum(), 1e-30))


def rms_norm(x: Exact, scale: Exact, eps: float, groups: int) -> Exact:
    """RMSNorm (arXiv:1910.07467) of `groups` parts of every row."""
    parts = x.reshape(len(x), groups, -1)
    rms = np.sqrt(np.mean(parts**2, axis=2, keepdims=True) + eps)
    normed: Exact = parts / rms * scale.reshape(-1)
    return normed.reshape(x.shape)


def layer_norm(x: Exact, scale: Exact, bias: Exact, eps: float) -> Exact:
    """Layer normalization (arXiv:1607.06450) of every row."""
    centred = x - x.mean(axis=1, keepdims=True)
    normed: Exact = centred / np.sqrt(np.mean(centred**2, axis=1, keepdims=True) + eps) * scale + bias
    return normed


def encode(q: Exact, k: Exact, v: Exact, spec: EncodeSpec) -> Exact:
    """Attention in which rows see others on both sides (arXiv:1706.03762), query heads sharing keys and values."""
    queries, keys, values = (
        part.reshape(len(part), heads, -1)
        for part, heads in ((q, spec.n_heads), (k, spec.n_kv_heads), (v, spec.n_kv_heads))
    )
    keys, values = (np.repeat(part, spec.n_heads // spec.n_kv_heads, axis=1) for part in (keys, values))
    scores = np.einsum("qhd,khd->hqk", queries, keys) * spec.scale
    if spec.window:
        places = np.arange(len(q))
        scores[:, np.abs(places[:, None] - places) > spec.window // 2] = -np.inf
    weights = np.exp(scores - scores.max(axis=2, keepdims=True))
    weights /= weights.sum(axis=2, keepdims=True)
    mixed: Exact = np.einsum("hqk,khd->qhd", weights, values).reshape(len(q), -1)
    return mixed


def gate(g: Exact, u: Exact, activation: Activation) -> Exact:
    """SwiGLU and GeGLU (arXiv:2002.05202); GELU in its tanh form (arXiv:1606.08415)."""
    if activation == "silu":
        return g * _sigmoid(g) * u
    gelu: Exact = 0.5 * g * (1 + np.tanh(math.sqrt(2 / math.pi) * (g + 0.044715 * g**3)))
    return gelu * u


def rope(x: Exact, positions: NDArray[np.int32], spec: RopeSpec, factors: Exact) -> Exact:
    """RoPE (arXiv:2104.09864) with YaRN (arXiv:2309.00071) on the first `n_dims` numbers of every head."""
    half = spec.n_dims // 2
    extrapolated = positions[:, None] * spec.base ** (-2 * np.arange(half) / spec.n_dims) / factors.reshape(-1)
    angle, magnitude = extrapolated * spec.freq_scale, spec.attn_factor
    if spec.ext_factor:
        mix = _yarn_mix(spec) * spec.ext_factor
        angle = angle * (1 - mix) + extrapolated * mix
        magnitude *= 1 + 0.1 * math.log(1 / spec.freq_scale)
    turned = x.reshape(len(x), spec.n_heads, -1).copy()
    first = np.arange(half) if spec.neox else 2 * np.arange(half)
    second = first + (half if spec.neox else 1)
    a, b = turned[..., first], turned[..., second]
    cos, sin = (magnitude * function(angle)[:, None] for function in (np.cos, np.sin))
    turned[..., first], turned[..., second] = a * cos - b * sin, a * sin + b * cos
    return turned.reshape(x.shape)


def attend(q: Exact, keys: NDArray[Any], values: NDArray[Any], mask: NDArray[np.float32], spec: AttendSpec) -> Exact:
    """Grouped-query attention (arXiv:2305.13245) over keys [head, place, dim] and values [head, dim, place]."""
    heads = []
    for head in range(spec.n_heads):
        kv_head = head * spec.n_kv_heads // spec.n_heads
        query = q[:, head * spec.head_dim_k : (head + 1) * spec.head_dim_k]
        scores = query @ keys[kv_head].T.astype(np.float64) * spec.scale
        if spec.softcap:
            scores = spec.softcap * np.tanh(scores / spec.softcap)
        weights = np.exp(scores + mask - (scores + mask).max(axis=1, keepdims=True))
        heads.append(weights / weights.sum(axis=1, keepdims=True) @ values[kv_head].T.astype(np.float64))
    return np.concatenate(heads, axis=1)


def attend_widths(spec: AttendSpec | EncodeSpec) -> tuple[tuple[int, int], ...]:
    """Heads and dimensions of q, k and v."""
    return (
        (spec.n_heads, spec.head_dim_k),
        (spec.n_kv_heads, spec.head_dim_k),
        (spec.n_kv_heads, spec.head_dim_v),
    )


def _sigmoid(x: Exact) -> Exact:
    return 0.5 * (1 + np.tanh(x / 2))


def _yarn_mix(spec: RopeSpec) -> Exact:
    """1 where a dimension turns more than beta_fast times in the training's context, 0 where less than beta_slow."""
    low, high = (
        spec.n_dims * math.log(spec.n_ctx_orig / (turns * 2 * math.pi)) / (2 * math.log(spec.base))
        for turns in (spec.beta_fast, spec.beta_slow)
    )
    low, high = max(0, math.floor(low)), min(spec.n_dims - 1, math.ceil(high))
    mix: Exact = 1 - np.clip((np.arange(spec.n_dims // 2) - low) / max(0.001, high - low), 0, 1)
    return mix
