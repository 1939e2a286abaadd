"""Operations on rows of activations: norms, activations, sums, rotary positions, and moving columns and rows."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from edgelm.engine.ir import Columns, NormSpec, RopeSpec
from edgelm.engine.rope import angles
from edgelm.files.blocks import Floats, dequantize
from edgelm_numpy.frame import Frame, Site, Step, at

TABLE_NUMBERS = 1 << 16
"""Numbers of a table that are float32 at a time."""


def lower_rms_norm(site: Site) -> Step:
    spec = site.op.params
    assert isinstance(spec, NormSpec)
    grouped = (site.rows, spec.groups, site.width // spec.groups)

    def run(frame: Frame) -> None:
        x = frame.values[site.op.inputs[0]].reshape(grouped)
        out = frame.values[site.op.output].reshape(grouped)
        np.multiply(x, x, out=out)
        rms = np.sqrt(out.mean(axis=2, keepdims=True) + np.float32(spec.eps))
        np.divide(x, rms, out=out)
        for scale in site.op.weights:
            np.multiply(out, frame.vector(scale, site.first_weight), out=out)

    return Step(run, heap_bytes=site.rows * spec.groups * 12 + 4 * grouped[2])


def lower_layer_norm(site: Site) -> Step:
    spec = site.op.params
    assert isinstance(spec, NormSpec)
    scale, bias = site.op.weights

    def run(frame: Frame) -> None:
        x, out = frame.values[site.op.inputs[0]], frame.values[site.op.output]
        centred = frame.work[0][: x.size].reshape(x.shape)
        np.subtract(x, x.mean(axis=1, keepdims=True), out=centred)
        np.multiply(centred, centred, out=out)
        deviation = np.sqrt(out.mean(axis=1, keepdims=True) + np.float32(spec.eps))
        np.divide(centred, deviation, out=out)
        np.multiply(out, frame.vector(scale, site.first_weight), out=out)
        np.add(out, frame.vector(bias, site.first_weight + 1), out=out)

    return Step(run, site.rows * site.width, site.rows * 12 + 8 * site.width)


def lower_add_row(site: Site) -> Step:
    (table,) = site.op.weights

    def run(frame: Frame) -> None:
        first = dequantize(table.type, frame.raw(table, site.first_weight, 1))
        np.add(frame.values[site.op.inputs[0]], first, out=frame.values[site.op.output])

    return Step(run, heap_bytes=8 * site.width)


def lower_add_positions(site: Site) -> Step:
    (table,) = site.op.weights
    tile = max(1, TABLE_NUMBERS // site.width)

    def run(frame: Frame) -> None:
        x, out, positions = frame.values[site.op.inputs[0]], frame.values[site.op.output], frame.positions()
        rows = frame.raw(table, site.first_weight, table.rows)
        for start in range(0, site.rows, tile):
            some = dequantize(table.type, rows[positions[start : start + tile]])
            np.add(x[start : start + tile], some, out=out[start : start + tile])

    return Step(run, heap_bytes=16 * min(tile, site.rows) * site.width)


def lower_concat(site: Site) -> Step:
    def run(frame: Frame) -> None:
        np.concatenate([frame.values[tile] for tile in site.op.inputs], axis=1, out=frame.values[site.op.output])

    return Step(run)


def lower_slice(site: Site) -> Step:
    assert isinstance(site.op.params, Columns)
    start, width = site.op.params

    def run(frame: Frame) -> None:
        frame.values[site.op.output][...] = frame.values[site.op.inputs[0]][:, start : start + width]

    return Step(run)


def lower_add(site: Site) -> Step:
    return _pair(site, lambda a, b, out: np.add(a, b, out=out))


def lower_mul(site: Site) -> Step:
    return _pair(site, lambda a, b, out: np.multiply(a, b, out=out))


def lower_gate(site: Site) -> Step:
    return _pair(site, {"silu": _silu_gate, "gelu": _gelu_gate}[str(site.op.params)])


def lower_activate(site: Site) -> Step:
    activate = {"silu": _silu, "gelu": _gelu}[str(site.op.params)]

    def run(frame: Frame) -> None:
        activate(frame.values[site.op.inputs[0]], frame.values[site.op.output])

    return Step(run)


def lower_scale(site: Site) -> Step:
    factor = np.float32(_number(site))

    def run(frame: Frame) -> None:
        np.multiply(frame.values[site.op.inputs[0]], factor, out=frame.values[site.op.output])

    return Step(run)


def lower_softcap(site: Site) -> Step:
    cap = np.float32(_number(site))

    def run(frame: Frame) -> None:
        out = frame.values[site.op.output]
        np.divide(frame.values[site.op.inputs[0]], cap, out=out)
        np.tanh(out, out=out)
        np.multiply(out, cap, out=out)

    return Step(run)


def lower_select(site: Site) -> Step:
    def run(frame: Frame) -> None:
        wanted = at(frame.bindings.out_rows, (site.rows,), np.int32)
        np.take(frame.values[site.op.inputs[0]], wanted, axis=0, out=frame.values[site.op.output], mode="clip")

    return Step(run, heap_bytes=8 * site.rows)


def lower_rope(site: Site) -> Step:
    spec = site.op.params
    assert isinstance(spec, RopeSpec)
    half, heads = spec.n_dims // 2, (site.rows, spec.n_heads, site.width // spec.n_heads)

    def run(frame: Frame) -> None:
        x = frame.values[site.op.inputs[0]].reshape(heads)
        out = frame.values[site.op.output].reshape(heads)
        x_0, x_1 = _pairs(x, spec)
        out_0, out_1 = _pairs(out, spec)
        cos, sin = _angles(frame, site, spec)
        product = frame.work[0][: x_0.size].reshape(x_0.shape)
        np.multiply(x_0, cos, out=out_0)
        out_0 -= np.multiply(x_1, sin, out=product)
        np.multiply(x_0, sin, out=out_1)
        out_1 += np.multiply(x_1, cos, out=product)
        out[..., 2 * half :] = x[..., 2 * half :]

    return Step(run, site.rows * spec.n_heads * half, 6 * 4 * site.rows * half)


def _pairs(x: Floats, spec: RopeSpec) -> tuple[Floats, Floats]:
    if spec.neox:
        return x[..., : spec.n_dims // 2], x[..., spec.n_dims // 2 : spec.n_dims]
    return x[..., 0 : spec.n_dims : 2], x[..., 1 : spec.n_dims : 2]


def _angles(frame: Frame, site: Site, spec: RopeSpec) -> tuple[Floats, Floats]:
    """Cosines and sines of the positions, float32 [n_tokens, 1, n_dims / 2]."""
    factors = frame.vector(site.op.weights[0], site.first_weight) if site.op.weights else None
    key = (spec._replace(n_heads=1), frame.bindings.weights[site.first_weight] if site.op.weights else None)
    if key not in frame.memo:  # the angles of one layer at a time: queries and keys share them
        frame.memo = {key: angles(spec, frame.positions(), factors)}
    cos, sin = frame.memo[key]
    return cos[:, None], sin[:, None]


def _silu_gate(gate: Floats, up: Floats, out: Floats) -> None:
    _silu(gate, out)
    out *= up


def _gelu_gate(gate: Floats, up: Floats, out: Floats) -> None:
    _gelu(gate, out)
    out *= up


def _silu(gate: Floats, out: Floats) -> None:
    np.negative(gate, out=out)
    np.exp(out, out=out)
    out += 1
    np.divide(gate, out, out=out)


def _gelu(gate: Floats, out: Floats) -> None:
    np.multiply(gate, gate, out=out)
    out *= 0.044715
    out += 1
    out *= gate
    out *= math.sqrt(2 / math.pi)
    np.tanh(out, out=out)
    out += 1
    out *= gate
    out *= 0.5


def _pair(site: Site, compute: Callable[[Floats, Floats, Floats], object]) -> Step:
    def run(frame: Frame) -> None:
        a, b = (frame.values[value] for value in site.op.inputs)
        compute(a, b, frame.values[site.op.output])

    return Step(run)


def _number(site: Site) -> float:
    assert isinstance(site.op.params, float)
    return site.op.params
