"""Operations that read matrices: `linear` and `embed`.

MLX cannot compute on memory that is not its own, so weights are copied: those that stay once, when they are adopted;
those that are streamed a tile of rows at a time, when the tile is multiplied. A row's product does not depend on where
a tile begins: quantized rows are summed one by one, float ones are multiplied in panels of equal shape.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from edgelm.engine.ir import Weight
from edgelm.files.blocks import TEMPORARY_BYTES, dequantize
from edgelm.files.ggml_types import TensorType
from edgelm_mlx.forms import FORMS, HALF, Form, held_row_bytes, runs
from edgelm_mlx.frame import Frame, Site, Step, at
from edgelm_mlx.runtime import Array, empty

PANEL = 32
"""Rows of a float matrix that are multiplied at a time."""
_UNSIGNED = {2: "uint16", 4: "uint32"}
_DTYPES = {TensorType.F32: "float32", TensorType.F16: "float16", TensorType.BF16: "bfloat16"}

Matrix = tuple[Array, ...]
"""Rows of a weight as MLX arrays [rows, items], one for each of `forms.runs`."""


def hold(mx: Any, weight: Weight, address: int, first: int, stop: int) -> Matrix:
    """Return rows [first, stop) of the weight that lies at `address` as MLX's own."""
    kind, width = weight.type, weight.width
    n_bytes = held_row_bytes(kind, width)
    rows = at(address + first * n_bytes, (stop - first, n_bytes), np.uint8)
    held = []
    for run in runs(kind, width):
        # NumPy has no bfloat16, so numbers are copied as integers of their size
        copy, memory = empty((len(rows), run.items), _UNSIGNED[run.item_bytes])
        memory.view(np.uint8)[...] = rows[:, run.at : run.stop]
        held.append(copy if run.kind is None else copy.view(getattr(mx, _DTYPES[run.kind])))
    return tuple(held)


def lower_linear(site: Site) -> Step:
    matrix, *biases = site.op.weights
    n, rows, width = site.rows, matrix.rows, matrix.width
    form = FORMS.get(matrix.type)
    halves = form is not None and form.halves
    # MLX widens scales and biases; a second product is added to the first
    if form is None:
        made_bytes = 4 * width + 8 * n
    else:
        made_bytes = (8 * width // form.group + 4 * n) * (1 + halves) + 4 * n * halves
    copied_bytes = made_bytes + held_row_bytes(matrix.type, width)
    signs = np.resize(np.repeat(np.array([1, -1], np.float32), HALF), width)

    def tile_rows(row_bytes: int) -> int:
        most = min(site.limits.tile_bytes // row_bytes, site.limits.flush_work // (n * width))
        return min(max(most // PANEL * PANEL, PANEL), -(-rows // PANEL) * PANEL)

    def run(frame: Frame) -> None:
        mx, x = frame.mx, frame.values[site.op.inputs[0]]
        address = frame.bindings.weights[site.first_weight]
        adopted = frame.session.adopted[address] if address < 0 else None
        row_bytes = copied_bytes if adopted is None else made_bytes
        tile = tile_rows(row_bytes)
        flipped = x * mx.array(signs) if halves else None
        parts: list[Array] = []
        for first in range(0, rows, tile):
            stop = min(first + tile, rows)
            if adopted is None:
                held = hold(mx, matrix, address, first, stop)
            else:
                held = adopted if tile >= rows else tuple(part[first:stop] for part in adopted)
            product = _panels(mx, x, held[0]) if form is None else _product(mx, x, held[:3], form)
            if form is not None and flipped is not None:
                product = product + _product(mx, flipped, (held[0], *held[3:]), form)
            parts.append(product)
            frame.made((stop - first) * row_bytes, n * width * (stop - first), parts)
        out = parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=1)
        for bias in biases:
            out = out + frame.vector(bias, site.first_weight + 1)
        frame.values[site.op.output] = out
        frame.made(2 * site.out_bytes)

    tile_bytes = max(tile_rows(row_bytes) * row_bytes for row_bytes in (made_bytes, copied_bytes))
    parts_bytes = site.out_bytes + 4 * n * width * halves
    return Step(run, parts_bytes + max(tile_bytes, 2 * site.out_bytes))


def _product(mx: Any, x: Array, held: Matrix, form: Form) -> Array:
    words, scales, biases = held
    return mx.quantized_matmul(x, words, scales, biases, transpose=True, group_size=form.group, bits=form.bits)


def _panels(mx: Any, x: Array, rows: Array) -> Array:
    """Return x W^T for float rows: kernels pick the order of summation by the shape of a product."""
    n_rows, width = rows.shape
    rest = -n_rows % PANEL
    rows = rows.astype(mx.float32)
    if rest:
        rows = mx.concatenate([rows, mx.zeros((rest, width))], axis=0)
    panels = rows.reshape(-1, PANEL, width).swapaxes(1, 2)
    product = mx.matmul(x[None], panels).swapaxes(0, 1).reshape(len(x), -1)
    return product[:, :n_rows] if rest else product


def lower_embed(site: Site) -> Step:
    (table,) = site.op.weights
    tile = max(1, site.limits.tile_bytes // TEMPORARY_BYTES // table.width)

    def run(frame: Frame) -> None:
        raw = frame.raw(table, site.first_weight, site.rows)
        out, numbers = empty((site.rows, site.width), "float32")
        for start in range(0, site.rows, tile):
            dequantize(table.type, raw[start : start + tile], numbers[start : start + tile])
        frame.values[site.op.output] = out
        frame.made(site.out_bytes)

    return Step(run, site.out_bytes + max(site.limits.tile_bytes, TEMPORARY_BYTES * table.width))
