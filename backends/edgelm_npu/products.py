"""Products as an NPU makes them: a fixed number of rows, 8-bit weights and activations, 32-bit sums; and the outliers.

Both parts are added up, in whichever order they come: the sum of two floats does not depend on it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from edgelm.engine.lanes import Lanes
from edgelm_npu.layout import TILE, row_bytes, tiles
from edgelm_npu.lowering import CHUNK, Stage, padded
from edgelm_npu.numbers import Codes, Doubles, Floats, Outliers, integer_product

if TYPE_CHECKING:
    from edgelm_npu.compiled import CompiledProducts

LANE_FLOATS = 1 << 18
"""Memory of a lane (1 MiB), if one tile does not need more."""
HEAP_FLOATS = 6
"""What NumPy allocates for a moment, in floats for each number of a chunk (to find outliers and hold them as float64)
and of a tile (to gather channels, to convert sums)."""


class Space(NamedTuple):
    """Scratch memory of the products of a segment, in floats: codes of the activations, and each lane's part."""

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
        return cls(held * max(widths), max(LANE_FLOATS, *(_tile_floats(width, held) for width in widths)), n_lanes)

    @property
    def n_bytes(self) -> int:
        return 4 * (self.inputs + self.n_lanes * self.lane)

    @property
    def heap_bytes(self) -> int:
        return 4 * HEAP_FLOATS * self.inputs + self.n_lanes * 2 * self.lane


def _tile_floats(width: int, rows: int) -> int:
    """Return what a tile takes of a lane: its weights and its products, as float64 at the most."""
    return 2 * TILE * (width + rows)


class Product(NamedTuple):
    """One product of a chunk: `x` [rows, width], `out` [rows, outputs], `raw` the packed matrix."""

    x: Floats
    outliers: Outliers
    out: Floats
    raw: NDArray[np.uint8]
    space: Space
    work: Floats
    lanes: Lanes
    device: CompiledProducts | None = None
    """Who computes in 8 bits, if not this processor in an NPU's place."""

    def on_the_npu(self, add: bool) -> None:
        """Multiply in 8 bits all channels but the outliers."""
        rows, width = self.x.shape
        codes = self.work[: padded(rows) * width].reshape(-1, width)
        self.outliers.codes(self.x, codes)
        steps = self.outliers.steps
        if self.device is not None:
            made = self.device.multiply(self.raw, codes[:rows], self.out.shape[1]) * steps
            _put(made, self.out, add)
            return

        def multiply(weights: Codes, scales: Floats, out: Floats, lane: Floats) -> None:
            n, held = weights.shape[:2]
            wide = lane[: n * TILE * width].reshape(n, TILE, width)
            wide[:, :held] = weights
            wide[:, held:] = 0
            rest, size = lane[wide.size :], n * len(codes) * TILE
            sums, partial = (rest[start : start + size].reshape(n, -1, TILE) for start in (0, size))
            integer_product(codes, wide, sums, partial)
            made = sums[:, :rows, :held]
            np.multiply(made, scales[:, None], out=made)
            np.multiply(made, steps, out=made)
            _put(made, out, add)

        self._each_tile(multiply)

    def of_outliers(self, add: bool) -> None:
        """Multiply the outliers, in the precision of floats."""
        rows = len(self.x)
        channels, numbers, steps = self.outliers.fixed_point(self.x)

        def multiply(weights: Codes, scales: Floats, out: Floats, lane: Floats) -> None:
            n, held = weights.shape[:2]
            doubles: Doubles = lane[: lane.size // 2 * 2].view(np.float64)
            some = doubles[: n * held * len(channels)].reshape(n, held, -1)
            some[...] = weights[:, :, channels]
            sums = doubles[some.size : some.size + n * rows * held].reshape(n, rows, held)
            np.matmul(numbers, some.transpose(0, 2, 1), out=sums)
            np.multiply(sums, scales[:, None], out=sums)
            np.multiply(sums, steps, out=sums)
            _put(sums, out, add)

        self._each_tile(multiply)

    def _each_tile(self, multiply: Callable[[Codes, Floats, Floats, Floats], None]) -> None:
        """Call `multiply(codes, scales, columns of out, memory)` for some tiles at a time, on all lanes."""
        rows, width = self.x.shape
        whole, rest = divmod(self.out.shape[1], TILE)
        tile_bytes = TILE * row_bytes(width)
        at_once = max(1, self.space.lane // _tile_floats(width, padded(rows)))
        n_tasks = -(-whole // at_once)

        def task(i: int, lane: int) -> None:
            memory = self.work[self.space.inputs + lane * self.space.lane :][: self.space.lane]
            first, last = (i * at_once, min((i + 1) * at_once, whole)) if i < n_tasks else (whole, whole + 1)
            codes, scales = tiles(self.raw[first * tile_bytes : last * tile_bytes].reshape(last - first, -1), width)
            columns = self.out[:, first * TILE : last * TILE].reshape(rows, last - first, codes.shape[1])
            multiply(codes, scales, columns.transpose(1, 0, 2), memory)

        self.lanes.each(n_tasks + (rest > 0), task)


def _put(made: Floats | Doubles, out: Floats, add: bool) -> None:
    """Write what was made to `out`, rounded to float32, or add it."""
    if add:
        out += made.astype(np.float32, copy=False)
    else:
        out[...] = made
