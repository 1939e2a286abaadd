"""8-bit integers for floats, products of them as NPUs make them, and which channels are outliers.

Integer products go through float32 BLAS, which is exact as long as no sum reaches 2^24.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Codes = NDArray[np.int8]
Channels = NDArray[np.int64]

LIMIT = 127
EXACT_COLUMNS = (1 << 24) // (LIMIT * LIMIT)
"""Columns that products of 8-bit integers may be summed over in float32: 1,040."""
OUTLIERS = 32
"""Channels of an activation that are computed in float: SmolLM2 needs more than 4 of 576 (see docs/npu.md)."""


def n_outliers(width: int) -> int:
    """Return how many channels of an activation are computed on the CPU: a fixed number, so that shapes are."""
    return min(OUTLIERS, width // 4)


def quantize(x: Floats) -> tuple[Codes, Floats]:
    """Return codes and float32 scales [rows, 1] of `x`, symmetric, row by row. What is not finite becomes zero."""
    x = np.nan_to_num(x, nan=0.0, posinf=0.0, neginf=0.0)
    scales = np.maximum(np.abs(x).max(axis=1, keepdims=True) / np.float32(LIMIT), np.float32(1e-30))
    return np.rint(x / scales).astype(np.int8), scales


def outliers(x: Floats) -> tuple[Channels, np.float32]:
    """Return the channels of `x` [rows, width] with the largest numbers, ascending, and the scale of all others.

    One scale for a whole chunk, as NPUs have it: a few channels with huge numbers would leave the rest only a few
    steps. llm.npu (arXiv:2407.05858) finds scales and channels with a calibration set, beforehand; here they are found in
    the chunk itself, which needs no set, but makes the rows of a chunk depend on each other.
    """
    largest = np.abs(x).max(axis=0)
    k = n_outliers(x.shape[1])
    split = len(largest) - k
    by_size = np.argpartition(largest, split - 1) if k else np.arange(len(largest))
    rest = largest[by_size[:split]].max()
    scale = max(np.float32(rest) / np.float32(LIMIT), np.float32(1e-30))
    return np.sort(by_size[split:]).astype(np.int64), np.float32(scale)


def integer_product(x: Floats, weights: Floats, out: Floats, partial: Floats) -> None:
    """Fill `out` [tiles, rows, 32] with x W^T for integers held as float32: exact in 32-bit sums, like an NPU's.

    `x` [rows, width], `weights` [tiles, 32, width]; `partial` is like `out`, and used where a row is long.
    """
    width = x.shape[1]
    totals: NDArray[np.int32] | None = None
    for start in range(0, width, EXACT_COLUMNS):
        columns = slice(start, start + EXACT_COLUMNS)
        target = out if width <= EXACT_COLUMNS else partial
        np.matmul(x[:, columns], weights[:, :, columns].transpose(0, 2, 1), out=target)
        if target is partial:
            sums = out.view(np.int32)
            if totals is None:
                totals = sums
                np.copyto(sums, partial, casting="unsafe")
            else:
                sums += partial.astype(np.int32)
    if totals is not None:
        np.copyto(out, totals, casting="unsafe")
