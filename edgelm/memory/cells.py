"""The numbers of one tensor of the cache: of one layer, keys or values. Knows bytes, no positions."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from edgelm.files.quantize import from_blocks, to_blocks
from edgelm.memory.buffer import Buffer
from edgelm.memory.cache_layout import Item, is_quantized, vector_bytes

_DTYPES: dict[str, Any] = {"f32": np.float32, "f16": np.float16}
Numbers = NDArray[np.float32] | NDArray[np.float16]
_MOVED_BYTES = 1 << 18
"""What is moved at a time when places are added: memory that nobody planned."""


class Cells:
    """`n_places` places of `n_heads` heads, in a region of `buffer` that begins at `start` and has room for `most`.

    They lie densely: [head, place, dimension], or [head, dimension, place].
    """

    def __init__(
        self,
        buffer: Buffer,
        start: int,
        n_heads: int,
        dim: int,
        most: int,
        item: Item,
        order: Literal["dim_place", "place_dim"],
    ) -> None:
        self._buffer, self._start, self._heads, self._dim, self._most = buffer, start, n_heads, dim, most
        self.item, self._order = item, order
        self.n_places = 0

    @property
    def address(self) -> int:
        return self._buffer.address + self._start

    @property
    def region_bytes(self) -> int:
        """Room for all places."""
        return self._most * self.place_bytes

    @property
    def place_bytes(self) -> int:
        """Bytes of one place of all heads."""
        return self._heads * vector_bytes(self.item, self._dim)

    def get(self, places: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return what lies there, as float32 [n, heads, dimension]."""
        found = self._view()[:, places].transpose(1, 0, 2)
        if is_quantized(self.item):
            rows = np.ascontiguousarray(found).reshape(len(places) * self._heads, -1)
            return from_blocks(self.item, rows).reshape(len(places), self._heads, self._dim)
        return found.astype(np.float32)

    def put(self, places: NDArray[np.int64], numbers: Numbers) -> None:
        """Store [n, heads, dimension], rounded to this type."""
        rounded: NDArray[Any] = numbers
        if is_quantized(self.item):
            rounded = to_blocks(self.item, numbers.astype(np.float32, copy=False))
        with np.errstate(over="ignore"):  # as in a backend that stores such numbers itself
            self._view()[:, _run(places)] = rounded.transpose(1, 0, 2)

    def move(self, sources: NDArray[np.int64], targets: NDArray[np.int64]) -> None:
        view = self._view()
        view[:, targets] = view[:, sources]

    def resize(self, n_places: int) -> None:
        """Have so many places from now on; what lies in those that stay keeps its place."""
        old, self.n_places = self.n_places, n_places
        kept, width = min(old, n_places), 1 if self._order == "dim_place" else vector_bytes(self.item, self._dim)
        unit = np.dtype(_DTYPES[self.item]).itemsize if self._order == "dim_place" else width
        rows = self._heads * self._dim if self._order == "dim_place" else self._heads
        if kept and old != n_places and rows > 1:
            self._respace(rows, old * unit, n_places * unit, kept * unit)
        if n_places < old:
            self._buffer.discard(self._start + n_places * self.place_bytes, self._start + old * self.place_bytes)

    def _respace(self, n_rows: int, old_bytes: int, new_bytes: int, kept_bytes: int) -> None:
        """Move rows that lie `old_bytes` apart to `new_bytes`; the first `kept_bytes` of each matter."""
        flat = np.frombuffer(self._buffer.view, np.uint8, n_rows * max(old_bytes, new_bytes), self._start)
        step = max(1, _MOVED_BYTES // max(old_bytes, new_bytes))
        firsts = range(0, n_rows, step)
        for first in reversed(firsts) if new_bytes > old_bytes else firsts:
            n = min(step, n_rows - first)
            rows = flat[first * old_bytes : (first + n) * old_bytes].reshape(n, old_bytes)[:, :kept_bytes].copy()
            target = flat[first * new_bytes : (first + n) * new_bytes].reshape(n, new_bytes)
            target[:, :kept_bytes] = rows
            target[:, kept_bytes:] = 0  # no stray bits: they would be multiplied by a weight of nothing

    def _view(self) -> NDArray[Any]:
        """Return all places as [head, place, dimension], of quantized types bytes."""
        if is_quantized(self.item):
            width = vector_bytes(self.item, self._dim)
            flat = np.frombuffer(self._buffer.view, np.uint8, self._heads * self.n_places * width, self._start)
            return flat.reshape(self._heads, self.n_places, width)
        n = self._heads * self.n_places * self._dim
        numbers = np.frombuffer(self._buffer.view, _DTYPES[self.item], n, self._start)
        if self._order == "dim_place":
            return numbers.reshape(self._heads, self._dim, self.n_places).transpose(0, 2, 1)
        return numbers.reshape(self._heads, self.n_places, self._dim)


def _run(places: NDArray[np.int64]) -> NDArray[np.int64] | slice:
    """Return the slice of places that follow each other, which is faster to write to; others as they are."""
    if len(places) and np.array_equal(places, np.arange(places[0], places[0] + len(places))):
        return slice(int(places[0]), int(places[-1]) + 1)
    return places
