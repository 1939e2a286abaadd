"""The operations that NumPy does between two graphs: decode rows, and join columns.

Each takes the addresses of its weights, of its inputs and of its output.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgelm.engine.backend import PassShape
from edgelm.engine.ir import Segment
from edgelm.files.blocks import dequantize
from edgelm.files.ggml_types import row_bytes

Addresses = Sequence[int]
HostStep = Callable[[Addresses, Addresses, int], None]

ROWS_AT_ONCE = 64


def host_step(segment: Segment, shape: PassShape) -> HostStep:
    """Return what computes this segment of one operation."""
    return {"embed": _embed, "concat": _concat, "left_over": _left_over}[segment.ops[0].kind](segment, shape)


def array(address: int, shape: tuple[int, ...], dtype: type[np.generic]) -> NDArray[Any]:
    """View memory as an array."""
    n_bytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return np.ndarray(shape, dtype, memoryview((ctypes.c_char * n_bytes).from_address(address)))


def _embed(segment: Segment, shape: PassShape) -> HostStep:
    (op,) = segment.ops
    (table,) = op.weights
    n, n_bytes = shape.n_tokens, row_bytes(table.type, table.width)

    def run(weights: Addresses, inputs: Addresses, output: int) -> None:
        raw, out = array(weights[0], (n, n_bytes), np.uint8), array(output, (n, table.width), np.float32)
        for start in range(0, n, ROWS_AT_ONCE):
            dequantize(table.type, raw[start : start + ROWS_AT_ONCE], out[start : start + ROWS_AT_ONCE])

    return run


def _left_over(segment: Segment, shape: PassShape) -> HostStep:
    """The product with the few rows of a matrix that no packed tile holds."""
    (op,) = segment.ops
    matrix, *bias = op.weights
    n = shape.rows(segment.values[op.output].per)
    n_bytes = row_bytes(matrix.type, matrix.width)

    def run(weights: Addresses, inputs: Addresses, output: int) -> None:
        rows = dequantize(matrix.type, array(weights[0], (matrix.rows, n_bytes), np.uint8))
        y = array(output, (n, matrix.rows), np.float32)
        np.matmul(array(inputs[0], (n, matrix.width), np.float32), rows.T, out=y)
        for vector, address in zip(bias, weights[1:], strict=True):
            y += dequantize(vector.type, array(address, (1, row_bytes(vector.type, vector.width)), np.uint8))

    return run


def _concat(segment: Segment, shape: PassShape) -> HostStep:
    (op,) = segment.ops
    n = shape.rows(segment.values[op.output].per)
    widths = [segment.values[value].width for value in op.inputs]

    def run(weights: Addresses, inputs: Addresses, output: int) -> None:
        if inputs[0] == output:
            return  # a single row, computed in its place
        parts = [array(address, (n, width), np.float32) for address, width in zip(inputs, widths, strict=True)]
        np.concatenate(parts, axis=1, out=array(output, (n, sum(widths)), np.float32))

    return run
