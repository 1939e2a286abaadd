"""Arrays over addresses, and weights as float32. The layout of a Q8_0 block is in `ggml-common.h` of llama.cpp."""

import ctypes
import math

import numpy as np

from edgelm.engine.ir import Weight
from edgelm.files.ggml_types import TensorType

_Q8_0 = np.dtype([("scale", "<f2"), ("quants", "i1", 32)])
TYPES = {TensorType.F32: np.dtype("<f4"), TensorType.F16: np.dtype("<f2"), TensorType.Q8_0: _Q8_0}


def at(address: int, shape: tuple[int, ...], dtype: object) -> np.ndarray:
    """Return the array that lies at `address`; no copy."""
    dtype = np.dtype(dtype)
    memory = (ctypes.c_ubyte * (dtype.itemsize * math.prod(shape))).from_address(address)
    return np.frombuffer(memory, dtype).reshape(shape)


def numbers(weight: Weight, address: int, rows: int | None = None) -> np.ndarray:
    """Return a weight as float32 [rows, width]."""
    rows = weight.rows if rows is None else rows
    if weight.type is not TensorType.Q8_0:
        return at(address, (rows, weight.width), TYPES[weight.type]).astype(np.float32, copy=False)
    blocks = at(address, (rows, weight.width // 32), _Q8_0)
    return (blocks["quants"] * blocks["scale"][..., None].astype(np.float32)).reshape(rows, weight.width)
