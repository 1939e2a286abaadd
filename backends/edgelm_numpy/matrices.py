"""Operations that read quantized matrices: `linear` and `embed`.

A matrix is read in tiles of rows: a tile becomes float32 in a lane's scratch memory and is multiplied there, panel by
panel. A panel is always `PANEL` rows, the last one of a matrix filled up: BLAS picks kernels, blocking and order of
summation by the shape of a product, so equal shapes are what makes a row's result independent of where a tile, a unit
or a thread begins.
"""

from __future__ import annotations

import numpy as np

from edgelm.files.blocks import QUANTIZED, TEMPORARY_BYTES, Floats, Parts, dequantize, take_apart
from edgelm_numpy.frame import Frame, Site, Step

PANEL = 32
"""Rows of a matrix that are multiplied at a time."""
TILE_WEIGHTS = 1 << 18
"""Weights that a lane holds as float32 (1 MiB). Smaller tiles make lanes wait for each other inside the interpreter."""
SHARED_WEIGHTS = 1 << 17
"""A lane joins in for this many weights at least: waking it for fewer takes longer than it saves."""


def lower_linear(site: Site) -> Step:
    matrix, *biases = site.op.weights
    n, rows, width = site.rows, matrix.rows, matrix.width
    tile = _tile_rows(rows, width, site.n_lanes)

    def run(frame: Frame) -> None:
        x, out = frame.values[site.op.inputs[0]], frame.values[site.op.output]
        raw = frame.raw(matrix, site.first_weight, rows)

        def multiply(task: int, lane: int) -> None:
            start = task * tile
            some, columns = raw[start : start + tile], out[:, start : start + tile]
            work = frame.work[lane]
            weights, product = work[: tile * width].reshape(tile, width), work[tile * width :]
            if n == 1 and matrix.type in QUANTIZED:
                _multiply_codes(x[0], take_apart(matrix.type, some), weights, columns[0])
            else:
                dequantize(matrix.type, some, weights[: len(some)])
                _multiply_panels(x, weights, columns, product[: n * PANEL].reshape(n, PANEL))

        frame.lanes.each(-(-rows // tile), multiply)
        for bias in biases:
            np.add(out, frame.vector(bias, site.first_weight + 1), out=out)

    return Step(run, tile * width + n * PANEL, site.n_lanes * tile * width * TEMPORARY_BYTES)


def _multiply_panels(x: Floats, weights: Floats, out: Floats, product: Floats) -> None:
    """Fill `out` [n, rows] with x W^T; `weights` has room for whole panels, `product` [n, PANEL] for the last."""
    n, rows = out.shape
    panels, rest = divmod(rows, PANEL)
    whole, width = panels * PANEL, weights.shape[1]
    if panels:
        columns = out[:, :whole].reshape(n, panels, PANEL).transpose(1, 0, 2)
        np.matmul(x, weights[:whole].reshape(panels, PANEL, width).transpose(0, 2, 1), out=columns)
    if rest:
        weights[rows : whole + PANEL] = 0
        np.matmul(x, weights[whole : whole + PANEL].T, out=product)
        out[:, whole:] = product[:, :rest]


def _multiply_codes(x: Floats, parts: Parts, weights: Floats, out: Floats) -> None:
    """Fill `out` [rows] with W x for one row of activations: scales meet the sum of a group, not each weight.

    That is nearly twice as fast as multiplying scaled weights, and rounds no more often.
    """
    rows, width = len(out), weights.shape[1]
    panels, groups = -(-rows // PANEL), parts.scales.size // rows
    filled = weights[: panels * PANEL]
    filled[:rows].reshape(parts.codes.shape)[...] = parts.codes
    filled[rows:] = 0
    x = x.reshape(groups, -1, 1)
    by_group = filled.reshape(panels, PANEL, groups, width // groups).transpose(0, 2, 1, 3)
    sums = np.matmul(by_group, x)[..., 0].transpose(0, 2, 1).reshape(-1, groups)[:rows]
    # A fresh array in C order: NumPy would add a row in another order if its columns were the contiguous ones.
    sums = np.multiply(sums, parts.scales.reshape(rows, groups), order="C")
    if parts.offsets is not None:
        sums += parts.offsets.reshape(rows, groups) * x.sum(axis=1)[:, 0]
    sums.sum(axis=1, out=out)


def lower_embed(site: Site) -> Step:
    (table,) = site.op.weights
    tile = max(1, TILE_WEIGHTS // table.width)

    def run(frame: Frame) -> None:
        out, raw = frame.values[site.op.output], frame.raw(table, site.first_weight, site.rows)
        for start in range(0, site.rows, tile):
            frame.lanes.check()
            dequantize(table.type, raw[start : start + tile], out[start : start + tile])

    return Step(run, 0, min(tile, site.rows) * table.width * TEMPORARY_BYTES)


def _tile_rows(rows: int, width: int, n_lanes: int) -> int:
    """Whole panels: no more than fit into `TILE_WEIGHTS`, and so many tiles that every lane has as many."""
    sharing = max(1, min(n_lanes, rows * width // SHARED_WEIGHTS))
    rounds = -(-rows * width // (TILE_WEIGHTS * sharing))
    largest = max(1, TILE_WEIGHTS // (PANEL * width))
    return min(largest, -(-rows // (PANEL * sharing * rounds))) * PANEL
