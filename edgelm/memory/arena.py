"""The KV cache: which token's keys and values lie where, and the memory they lie in.

Item type and order are the backend's choice (`CacheLayout`); what is stored can be handed over to a cache of any other
layout. Layers that see everything have a place for every position; layers with a sliding window share places in a
ring, if the backend allows it. Knows positions and bytes, no model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from edgelm.memory.buffer import Buffer, align_up
from edgelm.memory.cache_layout import USUAL, CacheLayout

LENGTH_STEP = 256
"""Passes see the cache in steps of this many places, so that a compiled pass serves for many tokens."""
PLACE_STEP = 32
_MASK_ROWS = 32
_HANDED_OVER = 128
"""Positions that are handed over at a time: a few hundred kilobytes of numbers."""


class LayerCache(NamedTuple):
    """What one layer stores. Layers of one `group` share a `window` (0: everything) and so their places."""

    group: int
    window: int
    n_kv_heads: int
    head_dim_k: int
    head_dim_v: int


def depths(parents: Sequence[int]) -> NDArray[np.int32]:
    """Return how many of the same pass come before each row: int32 [rows]. `parents[i]` is the row before row i.

    -1 stands for what is stored. Raises `ValueError` if a row comes before its parent.
    """
    found = np.zeros(len(parents), np.int32)
    for row, parent in enumerate(parents):
        if not -1 <= parent < row:
            raise ValueError(f"row {row} of a tree follows row {parent}; parents come first")
        found[row] = found[parent] + 1 if parent >= 0 else 0
    return found


def is_chain(parents: Sequence[int]) -> bool:
    """Say whether every row follows the one before it."""
    return all(parent == row - 1 for row, parent in enumerate(parents))


def capacity(window: int, context: int, chunk: int, layout: CacheLayout = USUAL) -> int:
    """Return the places of a group: the context, or the window and the widest pass."""
    full = align_up(context, PLACE_STEP)
    return min(full, align_up(window + chunk, PLACE_STEP)) if window and layout.rings else full


def cache_bytes(layers: Sequence[LayerCache], context: int, chunk: int, layout: CacheLayout = USUAL) -> int:
    """Return the memory that `KVArena` will own."""
    return sum(n_bytes for layer in layers for n_bytes in _layer_bytes(layer, context, chunk, layout))


class KVArena:
    """The cache of one conversation: `n_past` positions are stored."""

    def __init__(self, layers: Sequence[LayerCache], context: int, chunk: int, layout: CacheLayout = USUAL) -> None:
        self.context, self.chunk, self.layout = context, chunk, layout
        self.windows = {layer.group: layer.window for layer in layers}
        self.capacities = {group: capacity(window, context, chunk, layout) for group, window in self.windows.items()}
        self._layers = tuple(layers)
        self._buffer = Buffer(max(cache_bytes(layers, context, chunk, layout), 1), huge=False)
        self.keys: list[int] = []
        self.values: list[int] = []
        at = self._buffer.address
        for layer in layers:
            key_bytes, value_bytes = _layer_bytes(layer, context, chunk, layout)
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

    def claim_tree(
        self, group: int, parents: Sequence[int], places: NDArray[np.int64], mask: NDArray[np.float32]
    ) -> None:
        """Say where the rows of a tree go, and what each may see: what is stored, its ancestors and itself.

        Fills `places` and `mask` as `claim` does. Rows take the places that as many positions in a row would take, so
        siblings do not share one. They count only after `keep`.
        """
        held, n_tokens = self._held[group], len(parents)
        np.remainder(np.arange(self.n_past, self.n_past + n_tokens), self.capacities[group], out=places)
        positions = self.n_past + depths(parents)
        held[places] = -1
        seen = held[: mask.shape[1]]
        window = self.windows[group]
        first = np.maximum(positions - window + 1, 0)[:, None] if window else 0
        mask.fill(-np.inf)
        np.copyto(mask, 0.0, where=(seen >= first) & (seen < self.n_past) & (seen >= 0))
        for row in range(n_tokens):
            ancestor = row
            while ancestor >= 0 and (not window or positions[row] - positions[ancestor] < window):
                mask[row, places[ancestor]] = 0.0
                ancestor = parents[ancestor]
        held[places] = positions

    def advance(self, n_tokens: int) -> None:
        """Count the claimed positions as stored."""
        self.n_past += n_tokens

    def keep(self, rows: Sequence[int], n_claimed: int) -> None:
        """Store the rows of a claimed tree that lie on one path from its root, in order; forget the others.

        What is kept moves next to what is stored, in every layer.
        """
        moved = [(row, at) for at, row in enumerate(rows) if row != at]
        assert all(row > at for row, at in moved), "the rows of a path come in order"
        if moved:
            sources, targets = (self.n_past + np.asarray(one) for one in zip(*moved, strict=True))
            for layer, facts in enumerate(self._layers):
                n_places = self.capacities[facts.group]
                for view in self._views(layer):
                    view[:, targets % n_places] = view[:, sources % n_places]
        claimed = np.arange(self.n_past, self.n_past + n_claimed)
        for held in self._held.values():
            held[claimed % len(held)] = -1
            held[claimed[: len(rows)] % len(held)] = claimed[: len(rows)]
        self.n_past += len(rows)

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

    def held(self, layer: int) -> NDArray[np.int32]:
        """Return the stored positions of a layer, in order: all, or those that a ring has not overwritten."""
        held = self._held[self._layers[layer].group]
        return np.sort(held[(held >= 0) & (held < self.n_past)])

    def export(self, layer: int, first: int, n: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Return keys and values of the positions `first` … `first + n - 1` as float32 [n, heads, dimension].

        Raises `ValueError` if the layer does not hold all of them.
        """
        places = self._places(layer, first, n)
        keys, values = self._views(layer)
        return (
            keys[:, places].transpose(1, 0, 2).astype(np.float32),
            values[:, places].transpose(1, 0, 2).astype(np.float32),
        )

    def import_(self, layer: int, first: int, keys: NDArray[np.float32], values: NDArray[np.float32]) -> None:
        """Store what `export` returned, rounded to this cache's items. Raises `ValueError` as `export` does."""
        places = self._places(layer, first, len(keys))
        own_keys, own_values = self._views(layer)
        with np.errstate(over="ignore"):  # as in a backend that stores such numbers itself
            own_keys[:, places] = keys.transpose(1, 0, 2)
            own_values[:, places] = values.transpose(1, 0, 2)

    def copy_from(self, other: KVArena) -> None:
        """Take over what another cache of the same model stores, whatever the layouts of the two.

        A ring takes the latest positions that it has places for. Raises `ValueError` if the caches are of different
        models or this one is too small.
        """
        if self._layers != other._layers or other.n_past > self.context:
            raise ValueError(f"a cache of {other.n_past} positions of this model does not fit in one of {self.context}")
        self.n_past = other.n_past
        for group, held in self._held.items():
            positions = other._held[group]
            latest = positions[(positions >= max(self.n_past - len(held), 0)) & (positions < self.n_past)]
            held.fill(-1)
            held[latest % len(held)] = latest
        for layer in range(len(self._layers)):
            # what is stored is one stretch, up to the last position
            for first in range(self.n_past - len(self.held(layer)), self.n_past, _HANDED_OVER):
                n = min(_HANDED_OVER, self.n_past - first)
                self.import_(layer, first, *other.export(layer, first, n))

    def _places(self, layer: int, first: int, n: int) -> NDArray[np.int64]:
        """Return where positions lie."""
        if not self._layers[layer].n_kv_heads:
            raise ValueError(f"keys and values of layer {layer} are kept elsewhere")
        held = self._held[self._layers[layer].group]
        positions = np.arange(first, first + n)
        places = positions % len(held)
        if first < 0 or first + n > self.n_past or not np.array_equal(held[places], positions):
            raise ValueError(f"layer {layer} does not hold all of the positions {first} to {first + n - 1}")
        return places

    def _views(self, layer: int) -> tuple[NDArray[Any], NDArray[Any]]:
        """Return keys and values of a layer as [head, place, dimension]."""
        facts, dtype = self._layers[layer], self.layout.dtype
        n_heads, n_places = facts.n_kv_heads, self.capacities[facts.group]
        start = self.keys[layer] - self._buffer.address
        keys = np.frombuffer(self._buffer.view, dtype, n_heads * n_places * facts.head_dim_k, start)
        start = self.values[layer] - self._buffer.address
        values = np.frombuffer(self._buffer.view, dtype, n_heads * n_places * facts.head_dim_v, start)
        if self.layout.values == "dim_place":
            by_head = values.reshape(n_heads, facts.head_dim_v, n_places).transpose(0, 2, 1)
        else:
            by_head = values.reshape(n_heads, n_places, facts.head_dim_v)
        return keys.reshape(n_heads, n_places, facts.head_dim_k), by_head

    def close(self) -> None:
        self._buffer.release()


def _layer_bytes(layer: LayerCache, context: int, chunk: int, layout: CacheLayout) -> tuple[int, int]:
    cells = capacity(layer.window, context, chunk, layout) * layer.n_kv_heads * np.dtype(layout.dtype).itemsize
    return cells * layer.head_dim_k, cells * layer.head_dim_v
