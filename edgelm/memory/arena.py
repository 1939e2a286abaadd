"""The KV cache: which token's keys and values lie where, and the memory they lie in.

One neutral layout for every backend: float16, keys [head, place, dimension], values [head, dimension, place]. Layers
that see everything have a place for every position; layers with a sliding window share places in a ring. Knows
positions and bytes, no model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from edgelm.memory.buffer import Buffer, align_up

LENGTH_STEP = 256
"""Passes see the cache in steps of this many places, so that a compiled pass serves for many tokens."""
PLACE_STEP = 32
ITEM_BYTES = 2
_MASK_ROWS = 32


class LayerCache(NamedTuple):
    """What one layer stores. Layers of one `group` share a `window` (0: everything) and so their places."""

    group: int
    window: int
    n_kv_heads: int
    head_dim_k: int
    head_dim_v: int


def capacity(window: int, context: int, chunk: int) -> int:
    """Return the places of a group: the context, or the window and the widest pass."""
    full = align_up(context, PLACE_STEP)
    return min(full, align_up(window + chunk, PLACE_STEP)) if window else full


def cache_bytes(layers: Sequence[LayerCache], context: int, chunk: int) -> int:
    """Return the memory that `KVArena` will own."""
    return sum(n_bytes for layer in layers for n_bytes in _layer_bytes(layer, context, chunk))


class KVArena:
    """The cache of one conversation: `n_past` positions are stored."""

    def __init__(self, layers: Sequence[LayerCache], context: int, chunk: int) -> None:
        self.context, self.chunk = context, chunk
        self.windows = {layer.group: layer.window for layer in layers}
        self.capacities = {group: capacity(window, context, chunk) for group, window in self.windows.items()}
        self._buffer = Buffer(max(cache_bytes(layers, context, chunk), 1), huge=False)
        self.keys: list[int] = []
        self.values: list[int] = []
        at = self._buffer.address
        for layer in layers:
            key_bytes, value_bytes = _layer_bytes(layer, context, chunk)
            self.keys.append(at)
            self.values.append(at + key_bytes)
            at += key_bytes + value_bytes
        self._held = {group: np.full(places, -1, np.int32) for group, places in self.capacities.items()}
        self.n_past = 0

    @property
    def n_bytes(self) -> int:
        return self._buffer.n_bytes

    def length(self, group: int, n_tokens: int) -> int:
        """Return how many places a pass of `n_tokens` more must see: all in use, rounded up."""
        return min(self.capacities[group], align_up(self.n_past + n_tokens, LENGTH_STEP))

    def claim(self, group: int, n_tokens: int, places: NDArray[np.int64], mask: NDArray[np.float32]) -> None:
        """Say where the next `n_tokens` positions go, and what each may see.

        Fills `places` [n_tokens] and `mask` [n_tokens, length] with 0 where a place holds a visible position, -inf
        elsewhere. The positions count only after `advance`.
        """
        held = self._held[group]
        positions = np.arange(self.n_past, self.n_past + n_tokens, dtype=np.int32)
        np.remainder(positions, self.capacities[group], out=places)
        held[places] = positions
        seen = held[: mask.shape[1]]
        window = self.windows[group]
        for start in range(0, n_tokens, _MASK_ROWS):  # in blocks: the comparisons need memory that nobody planned
            last = positions[start : start + _MASK_ROWS, None]
            first = np.maximum(last - window + 1, 0) if window else 0
            block = mask[start : start + _MASK_ROWS]
            block.fill(0.0)
            np.copyto(block, -np.inf, where=(seen > last) | (seen < first))

    def advance(self, n_tokens: int) -> None:
        """Count the claimed positions as stored."""
        self.n_past += n_tokens

    def truncate(self, n_past: int) -> int:
        """Forget positions from `n_past` on; return how many are kept.

        Fewer than asked are kept (none) if a ring has overwritten positions that the next token must see.
        """
        n_past = min(n_past, self.n_past)
        for group, window in self.windows.items():
            held = self._held[group]
            held[held >= n_past] = -1
            needed = min(window - 1, n_past) if window else n_past
            if n_past and np.count_nonzero(held >= n_past - needed) < needed:
                n_past = 0
        if n_past == 0:
            for held in self._held.values():
                held.fill(-1)
        self.n_past = n_past
        return n_past

    def close(self) -> None:
        self._buffer.release()


def _layer_bytes(layer: LayerCache, context: int, chunk: int) -> tuple[int, int]:
    cells = capacity(layer.window, context, chunk) * layer.n_kv_heads * ITEM_BYTES
    return cells * layer.head_dim_k, cells * layer.head_dim_v
