"""Operations that read quantized matrices: `linear` and `embed`.

A matrix is read in tiles of rows: a tile is turned into float32 in a lane's scratch memory and multiplied there, panel
by panel. A panel is always `PANEL` rows, the last one of a matrix filled up: BLAS picks kernels, blocking and order of
summation by the shape of a product, so equal shapes are what makes a row's result independent of where a tile, a unit
or a thread begins.
"""

from __future__ import annotations

import numpy as np

from edgelm_numpy.dequantize import TEMPORARY_BYTES, dequantize
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
            start, work = task * tile, frame.work[lane]
            stop = min(start + tile, rows)
            weights = work[: tile * width].reshape(tile, width)
            dequantize(matrix.type, raw[start:stop], weights[: stop - start])
            panels, rest = divmod(stop - start, PANEL)
            if panels:
                columns = out[:, start : start + panels * PANEL].reshape(n, panels, PANEL).transpose(1, 0, 2)
                np.matmul(x, weights[: panels * PANEL].reshape(panels, PANEL, width).transpose(0, 2, 1), out=columns)
            if rest:
                weights[stop - start : (panels + 1) * PANEL] = 0
                product = work[tile * width :][: n * PANEL].reshape(n, PANEL)
                np.matmul(x, weights[panels * PANEL : (panels + 1) * PANEL].T, out=product)
                out[:, stop - rest : stop] = product[:, :rest]

        frame.lanes.each(-(-rows // tile), multiply)
        for bias in biases:
            np.add(out, frame.vector(bias, site.first_weight + 1), out=out)

    return Step(run, tile * width + n * PANEL, site.n_lanes * tile * width * TEMPORARY_BYTES)


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
