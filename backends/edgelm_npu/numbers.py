"""8-bit integers for floats, products of them as NPUs make them, and which channels are outliers.

Every sum here is of integers and exact, float BLAS or not: so its bits do not depend on how rows and tiles are cut.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Codes = NDArray[np.int8]

LIMIT = 127
EXACT_COLUMNS = (1 << 24) // (LIMIT * LIMIT)
"""Columns that products of 8-bit integers may be summed over in float32: 1,040."""
OUTLIERS = 4
"""Channels of an activation that are computed in float; docs/npu.md has what fewer and more cost."""
FIXED_POINT = float(1 << 22)
"""Steps from zero to the largest outlier of a row: about the precision of float32, and sums stay exact in float64."""


def n_outliers(width: int) -> int:
    """Return how many channels of a row are computed on the processor: a fixed number, so that shapes are."""
    return min(OUTLIERS, width // 4)


def quantize(x: Floats) -> tuple[Codes, Floats]:
    """Return codes and float32 scales [rows, 1] of `x`, symmetric, row by row. What is not finite becomes zero."""
    x = np.nan_to_num(x, nan=0.0, posinf=0.0, neginf=0.0)
    scales = np.maximum(np.abs(x).max(axis=1, keepdims=True) / np.float32(LIMIT), np.float32(1e-30))
    return np.rint(x / scales).astype(np.int8), scales


class Outliers(NamedTuple):
    """The largest numbers of each row of an activation: their `channels` [rows, n], and the step of 8-bit codes for
    what is left, `steps` [rows, 1].

    A few channels with huge numbers would leave all others a handful of steps. llm.npu (arXiv:2407.05858) finds scales
    and channels beforehand, with texts to calibrate on; here each row has its own, found when it comes: a token then
    means the same whatever else is in its chunk, however a prompt is cut.
    """

    channels: NDArray[np.int64]
    steps: Floats

    @classmethod
    def of(cls, x: Floats) -> Outliers:
        n, width = n_outliers(x.shape[1]), x.shape[1]
        sizes = np.abs(x)
        if n == 0:
            channels, largest = np.empty((len(x), 0), np.int64), sizes.max(axis=1, keepdims=True)
        else:
            order = np.argpartition(sizes, width - n - 1, axis=1)[:, width - n - 1 :]
            channels, largest = order[:, 1:].astype(np.int64), np.take_along_axis(sizes, order[:, :1], axis=1)
        return cls(channels, np.maximum(largest / np.float32(LIMIT), np.float32(1e-30)))

    def codes(self, x: Floats, out: Floats) -> None:
        """Fill `out` with the 8-bit codes of `x`, outliers left out; rows that `x` does not have become zero."""
        rows = len(x)
        np.divide(x, self.steps, out=out[:rows])
        np.rint(out[:rows], out=out[:rows])
        np.put_along_axis(out[:rows], self.channels, 0, axis=1)
        out[rows:] = 0

    def fixed_point(self, x: Floats) -> tuple[NDArray[np.int64], Doubles, Doubles]:
        """Return the channels that are an outlier of any row, the rows' numbers there (0 where they are none of that
        row's) as integers, float64 [rows, channels], and the step of each row."""
        numbers = np.take_along_axis(x, self.channels, axis=1).astype(np.float64)
        steps = np.maximum(np.abs(numbers).max(axis=1, keepdims=True, initial=0.0) / FIXED_POINT, 1e-300)
        used = np.unique(self.channels)
        placed = np.zeros((len(x), len(used)))
        np.put_along_axis(placed, np.searchsorted(used, self.channels), np.rint(numbers / steps), axis=1)
        return used, placed, steps


def integer_product(x: Floats, weights: Floats, out: Floats, partial: Floats) -> None:
    """Fill `out` [tiles, rows, 32] with x W^T for integers held as float32: exact in 32-bit sums, like an NPU's.

    `x` [rows, width], `weights` [tiles, 32, width]; `partial` is like `out`, and used where a row is long.
    """
    width = x.shape[1]
    if width <= EXACT_COLUMNS:
        np.matmul(x, weights.transpose(0, 2, 1), out=out)
        return
    sums = out.view(np.int32)
    sums.fill(0)
    for start in range(0, width, EXACT_COLUMNS):
        columns = slice(start, start + EXACT_COLUMNS)
        np.matmul(x[:, columns], weights[:, :, columns].transpose(0, 2, 1), out=partial)
        sums += partial.astype(np.int32)
    out[...] = sums.astype(np.float32)
