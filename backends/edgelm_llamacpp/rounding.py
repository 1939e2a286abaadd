"""ggml's own rounding of weights to few bits (`ggml_quantize_chunk`)."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from ctypes import c_int, c_int64, c_size_t, c_void_p

import numpy as np
from numpy.typing import NDArray

from edgelm.files.ggml_types import TensorType, row_bytes
from edgelm_llamacpp.ggml import function, load, open_library

TYPES = ("Q2_K", "Q3_K", "Q4_0", "Q4_1", "Q4_K", "Q5_0", "Q5_1", "Q5_K", "Q6_K", "Q8_0", "IQ4_NL", "IQ4_XS")
"""Those that need no statistics of the activations."""


def rounding(kind: TensorType) -> Callable[[NDArray[np.float32]], NDArray[np.uint8]] | None:
    """Return what rounds rows of numbers to this type; None for a type that ggml does not make by itself."""
    if kind.name not in TYPES:
        return None
    base = open_library(ctypes.CDLL, load().folder, "ggml-base")
    arguments = (c_int, c_void_p, c_void_p, c_int64, c_int64, c_int64, c_void_p)
    chunk = function(base, "ggml_quantize_chunk", c_size_t, arguments)

    def rounded(rows: NDArray[np.float32]) -> NDArray[np.uint8]:
        rows = np.ascontiguousarray(rows)
        out = np.empty((len(rows), row_bytes(kind, rows.shape[1])), np.uint8)
        written = chunk(kind, rows.ctypes.data, out.ctypes.data, 0, *rows.shape, None)
        assert written == out.nbytes, f"{written} bytes of {kind.name} instead of {out.nbytes}"
        return out

    return rounded
