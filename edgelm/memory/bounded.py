"""Chosen keys and values of one layer, and those that came after: never more places than it was made for."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edgelm.memory.arena import LayerCache
from edgelm.memory.buffer import Buffer, align_up

ITEM_BYTES = 2


def bounded_bytes(layer: LayerCache, n_places: int) -> int:
    """Return the memory of a `BoundedCache`."""
    return align_up(layer.n_kv_heads * n_places * (layer.head_dim_k + layer.head_dim_v) * ITEM_BYTES)


class BoundedCache:
    """`n` places are in use: `keys` and `values` are float16 [head, place, dimension], the newest last.

    Which positions lie there only shows in `end`, the one that comes next.
    """

    def __init__(self, layer: LayerCache, n_places: int) -> None:
        self._buffer = Buffer(bounded_bytes(layer, n_places), huge=False)
        self.n_places, self.n, self.end = n_places, 0, 0
        n_keys = layer.n_kv_heads * n_places * layer.head_dim_k
        n_values = layer.n_kv_heads * n_places * layer.head_dim_v
        view = self._buffer.view
        self._keys: NDArray[np.float16] = np.frombuffer(view, np.float16, n_keys)
        self._keys = self._keys.reshape(layer.n_kv_heads, n_places, layer.head_dim_k)
        self._values: NDArray[np.float16] = np.frombuffer(view, np.float16, n_values, n_keys * ITEM_BYTES)
        self._values = self._values.reshape(layer.n_kv_heads, n_places, layer.head_dim_v)

    @property
    def keys(self) -> NDArray[np.float16]:
        return self._keys[:, : self.n]

    @property
    def values(self) -> NDArray[np.float16]:
        return self._values[:, : self.n]

    def append(self, keys: NDArray[np.floating], values: NDArray[np.floating]) -> None:
        """Store [head, n, dimension] behind what is stored, rounded to float16."""
        n = keys.shape[1]
        assert self.n + n <= self.n_places, "there is room for what is appended"
        with np.errstate(over="ignore"):  # as in a backend that stores such numbers itself
            self._keys[:, self.n : self.n + n] = keys
            self._values[:, self.n : self.n + n] = values
        self.n += n
        self.end += n

    def keep(self, places: NDArray[np.int64]) -> None:
        """Forget all but these places, which are in order."""
        for stored in (self._keys, self._values):
            stored[:, : len(places)] = stored[:, places]
        self.n = len(places)

    def go_back(self, end: int) -> None:
        """Forget what a pass that was broken off appended from position `end` on."""
        self.n -= max(self.end - end, 0)
        self.end = min(self.end, end)

    def close(self) -> None:
        del self._keys, self._values
        self._buffer.release()
