"""The operations of `edgelm.engine.ir`. Each is given its parameters, its operands, its weights with their addresses,
the bindings and the shape of the pass, and returns float32 [rows, width]."""

import math

import numpy as np

from edgelm.engine.ir import RopeSpec
from edgelm_einsum.memory import at, numbers


def embed(_, operands, weights, bindings, shape):
    ((table, address),) = weights  # the rows of the pass, gathered one after the other
    return numbers(table, address, shape.n_tokens)


def rms_norm(spec, operands, weights, bindings, shape):
    groups = operands[0].reshape(len(operands[0]), spec.groups, -1)
    normed = groups / np.sqrt(np.mean(groups * groups, axis=2, keepdims=True) + np.float32(spec.eps))
    for scale, address in weights:
        normed *= numbers(scale, address)
    return normed.reshape(operands[0].shape)


def linear(_, operands, weights, bindings, shape):
    # einsum and not matmul: BLAS sums a matrix in another order than its row tiles, and a cut must change no bit
    y = np.einsum("ti,oi->to", np.ascontiguousarray(operands[0]), numbers(*weights[0]))
    for bias, address in weights[1:]:
        y += numbers(bias, address)
    return y


def gate(activation, operands, weights, bindings, shape):
    g, u = operands
    inner = g / 2 if activation == "silu" else np.float32(math.sqrt(2 / math.pi)) * (g + np.float32(0.044715) * g**3)
    return np.float32(0.5) * g * (1 + np.tanh(inner)) * u


def rope(spec, operands, weights, bindings, shape):
    x = operands[0].reshape(shape.n_tokens, spec.n_heads, -1)
    half = spec.n_dims // 2
    factors = numbers(*weights[0])[0] if weights else 1.0
    positions = at(bindings.positions, (shape.n_tokens, 1), np.int32).astype(np.float64)
    angle, magnitude = _angles(spec, positions * spec.base ** (-2 * np.arange(half) / spec.n_dims) / factors)
    cos, sin = ((magnitude * f(angle))[:, None].astype(np.float32) for f in (np.cos, np.sin))
    first = np.arange(half) if spec.neox else 2 * np.arange(half)
    second = first + (half if spec.neox else 1)
    a, b, turned = x[..., first], x[..., second], x.copy()
    turned[..., first], turned[..., second] = a * cos - b * sin, a * sin + b * cos
    return turned.reshape(shape.n_tokens, -1)


def _angles(spec: RopeSpec, plain):
    """Return angles and magnitude: stretched, or with YaRN (arXiv:2309.00071) stretched where they turn slowly."""
    if not spec.ext_factor:
        return plain * spec.freq_scale, spec.attn_factor
    turns = (spec.beta_fast, spec.beta_slow)
    low, high = (spec.n_dims * math.log(spec.n_ctx_orig / (n * 2 * math.pi)) / (2 * math.log(spec.base)) for n in turns)
    low, high = max(0, math.floor(low)), min(spec.n_dims - 1, math.ceil(high))
    slow = np.clip((np.arange(spec.n_dims // 2) - low) / max(0.001, high - low), 0, 1)
    mix = (1 - slow) * spec.ext_factor
    magnitude = spec.attn_factor * (1 + 0.1 * math.log(1 / spec.freq_scale))
    return plain * spec.freq_scale * (1 - mix) + plain * mix, magnitude


def attend(spec, operands, weights, bindings, shape):
    q, k, v = (x.reshape(shape.n_tokens, n, -1) for x, n in zip(operands, _heads(spec), strict=True))
    group = shape.groups[spec.group]
    keys = at(bindings.keys[spec.layer], (spec.n_kv_heads, group.capacity, spec.head_dim_k), np.float16)
    values = at(bindings.values[spec.layer], (spec.n_kv_heads, spec.head_dim_v, group.capacity), np.float16)
    places = at(bindings.places[spec.group], (shape.n_tokens,), np.int64)
    keys[:, places], values[:, :, places] = k.transpose(1, 0, 2), v.transpose(1, 2, 0)
    mask = at(bindings.masks[spec.group], (shape.n_tokens, group.length), np.float32)
    q = q.reshape(shape.n_tokens, spec.n_kv_heads, -1, spec.head_dim_k)
    scores = np.einsum("tghd,gpd->ghtp", q, keys[:, : group.length].astype(np.float32)) * np.float32(spec.scale)
    if spec.softcap:
        scores = np.float32(spec.softcap) * np.tanh(scores / np.float32(spec.softcap))
    scores += mask
    shares = np.exp(scores - scores.max(axis=-1, keepdims=True))
    shares /= shares.sum(axis=-1, keepdims=True)
    mixed = np.einsum("ghtp,gdp->tghd", shares, values[:, :, : group.length].astype(np.float32))
    return mixed.reshape(shape.n_tokens, -1)


def _heads(spec):
    return spec.n_heads, spec.n_kv_heads, spec.n_kv_heads


def select(_, operands, weights, bindings, shape):
    return operands[0][at(bindings.out_rows, (shape.n_outputs,), np.int32)]


OPERATIONS = {
    "embed": embed,
    "rms_norm": rms_norm,
    "linear": linear,
    "gate": gate,
    "rope": rope,
    "attend": attend,
    "select": select,
    "concat": lambda _, operands, *rest: np.concatenate(operands, axis=1),
    "slice": lambda columns, operands, *rest: operands[0][:, columns.start : columns.start + columns.width],
    "add": lambda _, operands, *rest: operands[0] + operands[1],
    "mul": lambda _, operands, *rest: operands[0] * operands[1],
    "scale": lambda factor, operands, *rest: operands[0] * np.float32(factor),
    "softcap": lambda cap, operands, *rest: np.float32(cap) * np.tanh(operands[0] / np.float32(cap)),
}
