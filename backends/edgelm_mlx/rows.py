"""Operations on rows of activations: norms, activations, sums, rotary positions, and moving columns and rows."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from edgelm.engine.ir import Columns, NormSpec, RopeSpec
from edgelm.engine.rope import angles
from edgelm_mlx.frame import Frame, Site, Step, at
from edgelm_mlx.runtime import Array

_NORM_COPIES = 3
"""Arrays as large as the input that a norm may make: MLX composes it of primitives where it has no kernel for it."""


def lower_rms_norm(site: Site) -> Step:
    spec = site.op.params
    assert isinstance(spec, NormSpec)
    shape = (site.rows, spec.groups, site.width // spec.groups)

    def run(frame: Frame) -> None:
        scale = None
        for weight in site.op.weights:
            scale = frame.vector(weight, site.first_weight)
        x = frame.values[site.op.inputs[0]].reshape(shape)
        frame.values[site.op.output] = frame.mx.fast.rms_norm(x, scale, spec.eps).reshape(site.rows, site.width)
        frame.made(_NORM_COPIES * site.out_bytes)

    return Step(run, _NORM_COPIES * site.out_bytes)


def lower_concat(site: Site) -> Step:
    return _of_inputs(site, lambda mx, *parts: mx.concatenate(parts, axis=1))


def lower_slice(site: Site) -> Step:
    assert isinstance(site.op.params, Columns)
    start, width = site.op.params
    return _of_inputs(site, lambda mx, x: x[:, start : start + width])


def lower_add(site: Site) -> Step:
    return _of_inputs(site, lambda mx, a, b: a + b)


def lower_mul(site: Site) -> Step:
    return _of_inputs(site, lambda mx, a, b: a * b)


def lower_scale(site: Site) -> Step:
    factor = _number(site)
    return _of_inputs(site, lambda mx, x: x * factor)


def lower_softcap(site: Site) -> Step:
    cap = _number(site)
    return _of_inputs(site, lambda mx, x: mx.tanh(x / cap) * cap, copies=3)


def lower_gate(site: Site) -> Step:
    if site.op.params == "silu":
        return _of_inputs(site, lambda mx, gate, up: gate * mx.sigmoid(gate) * up, copies=3)

    def run(frame: Frame) -> None:
        mx, (gate, up) = frame.mx, (frame.values[value] for value in site.op.inputs)
        inner = gate * gate * 0.044715 + 1.0
        frame.made(3 * site.out_bytes, alive=[inner])
        inner = mx.tanh(inner * gate * math.sqrt(2 / math.pi)) + 1.0
        frame.made(3 * site.out_bytes, alive=[inner])
        frame.values[site.op.output] = inner * gate * 0.5 * up
        del inner
        frame.made(3 * site.out_bytes)

    return Step(run, 3 * site.out_bytes)


def lower_select(site: Site) -> Step:
    def run(frame: Frame) -> None:
        wanted = frame.mx.array(at(frame.bindings.out_rows, (site.rows,), np.int32))
        frame.values[site.op.output] = frame.values[site.op.inputs[0]][wanted]
        frame.made(site.out_bytes)

    return Step(run, site.out_bytes)


def lower_rope(site: Site) -> Step:
    spec = site.op.params
    assert isinstance(spec, RopeSpec)
    half, heads = spec.n_dims // 2, (site.rows, spec.n_heads, site.width // spec.n_heads)

    def run(frame: Frame) -> None:
        mx, x = frame.mx, frame.values[site.op.inputs[0]].reshape(heads)
        cos, sin = _angles(frame, site, spec)
        turned, rest = x[..., : 2 * half], x[..., 2 * half :]
        if spec.neox:
            x_0, x_1 = turned[..., :half], turned[..., half:]
        else:
            x_0, x_1 = turned[..., 0::2], turned[..., 1::2]
        out_0, out_1 = x_0 * cos - x_1 * sin, x_0 * sin + x_1 * cos
        if spec.neox:
            out = mx.concatenate([out_0, out_1, rest], axis=-1)
        else:
            pairs = mx.stack([out_0, out_1], axis=-1).reshape(*heads[:2], 2 * half)
            out = mx.concatenate([pairs, rest], axis=-1)
        frame.values[site.op.output] = out.reshape(site.rows, site.width)
        frame.made(4 * site.out_bytes)

    return Step(run, 4 * site.out_bytes + 6 * 4 * site.rows * half)


def _angles(frame: Frame, site: Site, spec: RopeSpec) -> tuple[Array, Array]:
    """Cosines and sines of the positions, [n_tokens, 1, n_dims / 2]; queries and keys of a layer share them."""
    factors = np.array(frame.vector(site.op.weights[0], site.first_weight)) if site.op.weights else None
    key = (spec._replace(n_heads=1), frame.bindings.weights[site.first_weight] if site.op.weights else None)
    if key not in frame.memo:
        frame.memo = {key: [frame.mx.array(part[:, None]) for part in angles(spec, frame.positions(), factors)]}
    cos, sin = frame.memo[key]
    return cos, sin


def _of_inputs(site: Site, compute: Callable[..., Any], copies: int = 1) -> Step:
    """An operation of a few primitives, which make `copies` arrays as large as the output."""

    def run(frame: Frame) -> None:
        inputs = (frame.values[value] for value in site.op.inputs)
        frame.values[site.op.output] = compute(frame.mx, *inputs)
        frame.made(copies * site.out_bytes)

    return Step(run, copies * site.out_bytes)


def _number(site: Site) -> float:
    assert isinstance(site.op.params, float)
    return site.op.params
