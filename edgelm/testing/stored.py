"""One layer's keys or values for the contract suite: as the backend lays them, and as they should be."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from edgelm.files.quantize import from_blocks, to_blocks
from edgelm.memory.cache_layout import Item, is_quantized

_ALIGNMENT = 4096


class Stored:
    """`exact` [head, place, dimension] is what should be stored; the backend writes to `address`.

    Begins with `old` [head, place, dimension], not with zeros: what is written outside the given places, or read behind
    a mask, shows.
    """

    def __init__(self, item: Item, order: Literal["dim_place", "place_dim"], old: NDArray[np.float32]) -> None:
        self._item, self._turned = item, order == "dim_place"
        self.exact = self._rounded(old)
        turned = self.exact.transpose(0, 2, 1) if self._turned else self.exact
        self._shape = turned.shape
        raw = aligned(to_blocks(item, turned) if is_quantized(item) else turned)
        self._raw, self.address = raw, int(raw.ctypes.data)

    def store(self, places: NDArray[np.int64], numbers: NDArray[np.float32]) -> None:
        """Expect numbers [n, heads, dimension] in these places."""
        with np.errstate(over="raise"):
            self.exact[:, places] = self._rounded(numbers.transpose(1, 0, 2))

    def made(self) -> NDArray[Any]:
        """Return what the backend made of it, as [head, place, dimension]."""
        if is_quantized(self._item):
            rows = self._raw.reshape(self._shape[0] * self._shape[1], -1)
            return from_blocks(self._item, rows).reshape(self._shape)
        found = self._raw.view(self.exact.dtype).reshape(self._shape)
        return found.transpose(0, 2, 1) if self._turned else found

    def _rounded(self, numbers: NDArray[np.float32]) -> NDArray[Any]:
        if not is_quantized(self._item):
            return numbers.astype({"f16": np.float16, "f32": np.float32}[self._item])
        rows = numbers.reshape(-1, numbers.shape[-1])
        return from_blocks(self._item, to_blocks(self._item, rows)).reshape(numbers.shape)


def aligned(array: NDArray[np.generic]) -> NDArray[np.uint8]:
    """A copy of the array's bytes at an address that kernels like."""
    flat = np.frombuffer(array.tobytes(), np.uint8)
    data = np.empty(flat.size + _ALIGNMENT, np.uint8)
    start = -data.ctypes.data % _ALIGNMENT
    data[start : start + flat.size] = flat
    return data[start : start + flat.size]
