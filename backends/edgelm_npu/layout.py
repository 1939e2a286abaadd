"""Matrices as an NPU takes them: 8-bit integers with one scale for each row, in tiles of 32 rows.

A tile is the float32 scales of its rows, then the rows. Per-channel scales are what every NPU of the table in
`providers` has; groups within a row are not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from edgelm.engine.backend import Packed
from edgelm.files import ggml_types
from edgelm.files.blocks import TYPES, dequantize
from edgelm_npu.numbers import Codes, Floats, quantize

if TYPE_CHECKING:
    from edgelm.files.model import TensorInfo

TILE = 32
"""Rows of a tile: where edgelm cuts matrices."""
SCALE_BYTES = 4


def row_bytes(width: int) -> int:
    """Return the bytes of one packed row, its scale included."""
    return width + SCALE_BYTES


class Int8Layout:
    """See `edgelm.engine.backend.WeightLayout`."""

    key = "int8 rows, tiles of 32, 1"

    def packed(self, info: TensorInfo) -> Packed | None:
        if info.type not in TYPES or info.n_rows == 1:
            return None
        return Packed(row_bytes(info.shape[0]), TILE, "8-bit weights with one scale for each row")

    def pack(self, info: TensorInfo, first_row: int, rows: memoryview, out: memoryview) -> None:
        width = info.shape[0]
        stored = np.frombuffer(rows, np.uint8).reshape(-1, ggml_types.row_bytes(info.type, width))
        weights = dequantize(info.type, stored)
        pack_rows(weights, np.frombuffer(out, np.uint8))


def pack_rows(weights: Floats, out: NDArray[np.uint8]) -> None:
    """Write one tile of `weights` [rows, width] to `out`."""
    n = len(weights)
    codes, scales = quantize(weights)
    out[: n * SCALE_BYTES].view(np.float32)[...] = scales[:, 0]
    out[n * SCALE_BYTES : n * row_bytes(weights.shape[1])].view(np.int8)[...] = codes.reshape(-1)


def tiles(raw: NDArray[np.uint8], width: int) -> tuple[Codes, Floats]:
    """Return codes [tiles, rows, width] and scales [tiles, rows] of whole tiles, or of one that has fewer rows."""
    n = raw.shape[1] // row_bytes(width)
    scales = raw[:, : n * SCALE_BYTES].view(np.float32)
    return raw[:, n * SCALE_BYTES :].view(np.int8).reshape(len(raw), n, width), scales
