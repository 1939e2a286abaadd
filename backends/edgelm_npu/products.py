"""Products on the simulated NPU: a fixed number of rows, 8-bit weights and activations, 32-bit sums; outliers beside it.

Both parts write the same numbers' sum, in whichever order they come: adding two floats does not depend on it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from edgelm.engine.backend import Bindings
from edgelm.engine.ir import Op
from edgelm_npu.layout import TILE, row_bytes, tiles
from edgelm_npu.lowering import CHUNK, Stage, padded
from edgelm_npu.numbers import LIMIT, Codes, Floats, integer_product, outliers
from edgelm_numpy.dequantize import dequantize
from edgelm_numpy.frame import at
from edgelm_numpy.lanes import Lanes

LANE_FLOATS = 1 << 18
"""Memory of a lane (1 MiB), if one tile does not need more."""
_HEAP_BYTES = 16
"""For each number of a chunk: what NumPy allocates for a moment to find outliers, and to convert sums."""


class Space(NamedTuple):
    """Scratch memory of the products of a segment, in floats."""

    inputs: int
    lane: int
    n_lanes: int

    @classmethod
    def of(cls, parts: tuple[Stage, ...], rows: int, n_lanes: int) -> Space:
        """Return what is needed for chunks of up to `rows` rows."""
        held = padded(min(rows, CHUNK))
        widths = {op.weights[0].width for part in parts if part.kind == "npu" for op in part.ops}
        if not widths:
            return cls(0, 0, n_lanes)
        lane = max(_n_tiles(width, held) * _tile_floats(width, held) for width in widths)
        return cls(held * max(widths), lane, n_lanes)

    @property
    def n_bytes(self) -> int:
        return 4 * (self.inputs + self.n_lanes * self.lane)

    @property
    def heap_bytes(self) -> int:
        return _HEAP_BYTES * (self.inputs + self.n_lanes * self.lane // 4)


def _tile_floats(width: int, rows: int) -> int:
    return TILE * (width + 2 * rows)


def _n_tiles(width: int, rows: int) -> int:
    """Return how many tiles a lane multiplies at a time."""
    return max(1, LANE_FLOATS // _tile_floats(width, rows))


class Product(NamedTuple):
    """One product of a chunk: `x` [rows, width], `out` [rows, outputs], `raw` the packed matrix."""

    x: Floats
    out: Floats
    raw: NDArray[np.uint8]
    space: Space
    work: Floats
    lanes: Lanes

    def on_the_npu(self, add: bool) -> None:
        """Multiply in 8 bits: all channels but the outliers, with one scale for the chunk."""
        rows, width = self.x.shape
        channels, step = outliers(self.x)
        codes = self.work[: padded(rows) * width].reshape(-1, width)
        np.divide(self.x, step, out=codes[:rows])
        np.rint(codes[:rows], out=codes[:rows])
        np.clip(codes[:rows], -LIMIT, LIMIT, out=codes[:rows])
        codes[:, channels] = 0
        codes[rows:] = 0

        def multiply(weights: Codes, scales: Floats, out: Floats, lane: Floats) -> None:
            n, held = weights.shape[:2]
            wide = lane[: n * TILE * width].reshape(n, TILE, width)
            wide[:, :held] = weights
            wide[:, held:] = 0
            rest = lane[wide.size :]
            size = n * len(codes) * TILE
            sums, partial = (rest[start : start + size].reshape(n, -1, TILE) for start in (0, size))
            integer_product(codes, wide, sums, partial)
            _put(sums[:, :rows, :held], scales * step, out, add)

        self._each_tile(multiply)

    def of_outliers(self, add: bool) -> None:
        """Multiply the outliers in float: a fixed number of channels."""
        rows, width = self.x.shape
        channels, _ = outliers(self.x)
        n_channels = len(channels)
        floats = self.work[: padded(rows) * n_channels].reshape(-1, n_channels)
        np.take(self.x, channels, axis=1, out=floats[:rows], mode="clip")
        floats[rows:] = 0

        def multiply(weights: Codes, scales: Floats, out: Floats, lane: Floats) -> None:
            n, held = weights.shape[:2]
            some = lane[: n * TILE * n_channels].reshape(n, TILE, n_channels)
            some[:, :held] = weights[:, :, channels]
            some[:, held:] = 0
            sums = lane[some.size : some.size + n * len(floats) * TILE].reshape(n, -1, TILE)
            np.matmul(floats, some.transpose(0, 2, 1), out=sums)
            _put(sums[:, :rows, :held], scales, out, add)

        self._each_tile(multiply)

    def _each_tile(self, multiply: Callable[[Codes, Floats, Floats, Floats], None]) -> None:
        """Call `multiply(codes, scales, columns of out, memory)` for some tiles at a time, on all lanes."""
        rows, width = self.x.shape
        outputs = self.out.shape[1]
        whole, rest = divmod(outputs, TILE)
        tile_bytes = TILE * row_bytes(width)
        at_once = _n_tiles(width, padded(rows))
        n_tasks = -(-whole // at_once)

        def task(i: int, lane: int) -> None:
            memory = self.work[self.space.inputs + lane * self.space.lane :][: self.space.lane]
            first, last = (i * at_once, min((i + 1) * at_once, whole)) if i < n_tasks else (whole, whole + 1)
            columns = self.out[:, first * TILE : last * TILE]
            packed = self.raw[first * tile_bytes : last * tile_bytes].reshape(last - first, -1)
            codes, scales = tiles(packed, width)
            out = columns.reshape(rows, last - first, codes.shape[1]).transpose(1, 0, 2)
            multiply(codes, scales, out, memory)

        self.lanes.each(n_tasks + (rest > 0), task)


def _put(sums: Floats, scales: Floats, out: Floats, add: bool) -> None:
    """Scale sums [tiles, rows, 32] by scales [tiles, 32], and write them to `out` or add them to it."""
    np.multiply(sums, scales[:, None], out=sums)
    if add:
        out += sums
    else:
        out[...] = sums


def bias_of(op: Op, first: int, bindings: Bindings) -> Floats | None:
    """Return the bias of a product, float32 [outputs], if it has one."""
    if len(op.weights) == 1:
        return None
    bias = op.weights[1]
    raw = at(bindings.weights[first + 1], (1, bias.type.block_bytes * bias.width // bias.type.block_size), np.uint8)
    return dequantize(bias.type, raw)[0]


def packed_matrix(op: Op, first: int, bindings: Bindings) -> NDArray[np.uint8]:
    matrix = op.weights[0]
    return at(bindings.weights[first], (matrix.rows * row_bytes(matrix.width),), np.uint8)


