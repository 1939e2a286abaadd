"""Arrays at addresses: what passes between segments, seen by NumPy. Copies nothing."""

from __future__ import annotations

import ctypes
import math
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray


def at(address: int, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
    """Return the array that lies at `address`; no copy."""
    n_bytes = np.dtype(dtype).itemsize * math.prod(shape)
    memory = (ctypes.c_ubyte * n_bytes).from_address(address)
    return np.frombuffer(memoryview(memory), dtype).reshape(shape)
