"""The KV cache: which token's keys and values lie where, and the memory they lie in.

Item type and order are the backend's choice (`CacheLayout`); what is stored can be handed over to a cache of any other
layout. Layers that see everything have a place for every position; layers with a sliding window share places in a
ring, if the backend allows it. Knows positions and bytes, no model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from edgelm.memory.buffer import Buffer, align_up
from edgelm.memory.cache_layout import USUAL, CacheLayout, vector_bytes
from edgelm.memory.cells import Cells, Numbers

LENGTH_STEP = 256
"""Passes see the cache in steps of this many places, so that a compiled pass serves for many tokens."""
PLACE_STEP = 32
_MASK_ROWS = 32
KEPT_PLACES = 1024
"""Places that a shorter cache keeps for the next tokens; more are given back."""
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
    """Return the places of a group: the context, or the windows and the widest pass."""
    full = align_up(context, PLACE_STEP)
    return min(full, align_up(window * layout.windows + chunk, PLACE_STEP)) if window and layout.rings else full


def cache_bytes(layers: Sequence[LayerCache], context: int, chunk: int, layout: CacheLayout = USUAL) -> int:
    """Return the memory that `KVArena` will own."""
    return sum(n_bytes for layer in layers for n_bytes in _layer_bytes(layer, context, chunk, layout))


class KVArena:
    """The cache of one conversation: `n_past` positions are stored."""

    def __init__(self, layers: Sequence[LayerCache], context: int, chunk: int, layout: CacheLayout = USUAL) -> None:
        self.context, self.chunk, self.layout = context, chunk, layout
        self.windows = {layer.group: layer.window for layer in layers}
        self._most = {group: capacity(window, context, chunk, layout) for group, window in self.windows.items()}
        self._layers = tuple(layers)
        # address space for the whole context; a page is taken when it is first written (vAttention, arXiv:2405.04437)
        self._buffer = Buffer(max(cache_bytes(layers, context, chunk, layout), 1), huge=False)
        self._cells: list[tuple[Cells, Cells]] = []
        at = 0
        for layer in layers:
            pair: list[Cells] = []
            dims = (layer.head_dim_k, layer.head_dim_v)
            for dim, item, order in zip(dims, layout.items, ("place_dim", layout.values), strict=True):
                most = self._most[layer.group]
                pair.append(Cells(self._buffer, at, layer.n_kv_heads, dim, most, item, order))
                at += pair[-1].region_bytes
            self._cells.append((pair[0], pair[1]))
        self.keys = [keys.address for keys, _ in self._cells]
        self.values = [values.address for _, values in self._cells]
        self._held = {group: np.full(places, -1, np.int32) for group, places in self._most.items()}
        self.capacities = dict.fromkeys(self._most, 0)
        self.n_past = 0

    def grow(self, n_tokens: int) -> None:
        """Have places for `n_tokens` more. Those of a group that is not full grow in steps; nothing is lost."""
        for group, most in self._most.items():
            wanted = min(most, align_up(self.n_past + n_tokens, LENGTH_STEP))
            if wanted > self.capacities[group]:
                self._resize(group, wanted)

    def _resize(self, group: int, n_places: int) -> None:
        self.capacities[group] = n_places
        for layer, pair in zip(self._layers, self._cells, strict=True):
            if layer.group == group:
                for cells in pair:
                    cells.resize(n_places)

    @property
    def n_bytes(self) -> int:
        return self._buffer.n_bytes

    def places_of(self, group: int) -> NDArray[np.int32]:
        """Return which position each place of a group holds, -1 for none; to be written to by whoever claims places."""
        return self._held[group]

    def most_places(self, group: int) -> int:
        """Return the places that a group will have at the most."""
        return self._most[group]

    def length(self, group: int, n_tokens: int) -> int:
        """Return how many places a pass of `n_tokens` more must see: all in use, rounded up."""
        return min(self._most[group], align_up(self.n_past + n_tokens, LENGTH_STEP))

    def claim(self, group: int, n_tokens: int, places: NDArray[np.int64], mask: NDArray[np.float32]) -> None:
        """Say where the next `n_tokens` positions go, and what each may see.

        Fills `places` [n_tokens] and `mask` [n_tokens, length] with 0 where a place holds a visible position, -inf
        elsewhere. The positions count only after `advance`.
        """
        self.grow(n_tokens)
        held = self._held[group]
        positions = np.arange(self.n_past, self.n_past + n_tokens, dtype=np.int32)
        np.remainder(positions, len(held), out=places)
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
        self.grow(n_tokens)
        np.remainder(np.arange(self.n_past, self.n_past + n_tokens), len(held), out=places)
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
            for facts, pair in zip(self._layers, self._cells, strict=True):
                n_places = self._most[facts.group]
                for cells in pair:
                    cells.move(sources % n_places, targets % n_places)
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
        for group, most in self._most.items():
            needed = min(most, align_up(n_past, LENGTH_STEP))
            # a draft that was wrong is no reason to move rows together
            if needed + KEPT_PLACES < self.capacities[group] or not n_past:
                self._resize(group, needed)
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
        keys, values = self._cells[layer]
        return keys.get(places), values.get(places)

    def import_(self, layer: int, first: int, keys: Numbers, values: Numbers) -> None:
        """Store what `export` returned, or the same in half precision, rounded to this cache's items.

        Raises `ValueError` as `export` does.
        """
        places = self._places(layer, first, len(keys))
        for cells, numbers in zip(self._cells[layer], (keys, values), strict=True):
            cells.put(places, numbers)

    @property
    def layers(self) -> tuple[LayerCache, ...]:
        return self._layers

    def restore(self, n_past: int, firsts: Sequence[int]) -> None:
        """Be as if `n_past` positions were stored, of each layer those from `firsts[layer]`; they are to be imported.

        Rings hold the latest that they have places for. Raises `ValueError` if the next token must see more.
        """
        self.truncate(0)
        for layer, first in zip(self._layers, firsts, strict=True):
            if n_past - first < (min(layer.window - 1, n_past) if layer.window else n_past):
                raise ValueError(f"of {n_past} positions those before {first} are missing")
        self.n_past = n_past
        self.grow(0)
        for layer, first in zip(self._layers, firsts, strict=True):
            held = self._held[layer.group]
            held.fill(-1)
            latest = np.arange(max(n_past - len(held), first), n_past)
            held[latest % len(held)] = latest

    def copy_from(self, other: KVArena) -> None:
        """Take over what another cache of the same model stores, whatever the layouts of the two.

        A ring takes the latest positions that it has places for. Raises `ValueError` if the caches are of different
        models or this one is too small.
        """
        if self._layers != other._layers or other.n_past > self.context:
            raise ValueError(f"a cache of {other.n_past} positions of this model does not fit in one of {self.context}")
        self.n_past = other.n_past
        self.grow(0)
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

    def close(self) -> None:
        self._buffer.release()


def _layer_bytes(layer: LayerCache, context: int, chunk: int, layout: CacheLayout) -> tuple[int, int]:
    places = capacity(layer.window, context, chunk, layout) * layer.n_kv_heads
    keys, values = layout.items
    return places * vector_bytes(keys, layer.head_dim_k), places * vector_bytes(values, layer.head_dim_v)
