"""The operation `attend`: write keys and values into the cache, then attention over it.

A task is one key-value head and some rows of queries; keys and values become float32 a few places at a time, scores
are kept whole. Softmax is computed in float32.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgelm.engine.backend import is_quantized, vector_bytes
from edgelm.engine.ir import AttendSpec, EncodeSpec
from edgelm.files.blocks import Floats
from edgelm.files.quantize import from_blocks, to_blocks
from edgelm.memory.cache_layout import Item
from edgelm_numpy.frame import Frame, Site, Step, at

SCORES = 1 << 17
"""Scores that a lane keeps (512 KiB), if a single row of queries does not need more."""
ROWS = 512
"""Rows of queries that a lane takes at once where scores would let it take more."""
PLACES = 512
"""Places of the cache that are float32 at a time."""


def lower_attend(site: Site) -> Step:
    spec = site.op.params
    assert isinstance(spec, AttendSpec)
    n, cache = site.rows, site.shape.groups[spec.group]
    n_kv, dim_k, dim_v, length = spec.n_kv_heads, spec.head_dim_k, spec.head_dim_v, cache.length
    (key_item, value_item), order = site.shape.cache.items, site.shape.cache.values
    sharing = spec.n_heads // n_kv
    tile = max(1, min(n, SCORES // (sharing * length), ROWS // sharing))
    n_tiles = -(-n // tile)
    places_at_once = min(PLACES, length)

    def run(frame: Frame) -> None:
        q, k, v = (frame.values[value] for value in site.op.inputs)
        out = frame.values[site.op.output].reshape(n, n_kv, sharing, dim_v)
        bound = frame.bindings
        keys = _Cache(bound.keys[spec.layer], n_kv, cache.capacity, dim_k, key_item)
        values = _Cache(bound.values[spec.layer], n_kv, cache.capacity, dim_v, value_item, order)
        places = at(bound.places[spec.group], (n,), np.int64)
        mask = at(bound.masks[spec.group], (n, length), np.float32)
        keys.put(places, k.reshape(n, n_kv, dim_k))
        values.put(places, v.reshape(n, n_kv, dim_v))
        q = q.reshape(n, n_kv, sharing, dim_k)

        def attend(task: int, lane: int) -> None:
            head, start = task // n_tiles, task % n_tiles * tile
            stop = min(start + tile, n)
            rows = (stop - start) * sharing
            cut = _Cutter(frame.work[lane])
            queries, scores = cut(rows, dim_k), cut(rows, length)
            queries.reshape(-1, sharing, dim_k)[...] = q[start:stop, head]
            mixed, partial = cut(rows, dim_v), cut(rows, dim_v)
            block = cut(places_at_once, max(dim_k, dim_v)).reshape(-1)
            for first in range(0, length, places_at_once):
                stop_at = min(first + places_at_once, length)
                wide = keys.get(head, first, stop_at, block)
                np.matmul(queries, wide.T, out=scores[:, first:stop_at])
            _softmax(scores, spec, mask[start:stop], sharing)
            for first in range(0, length, places_at_once):
                stop_at = min(first + places_at_once, length)
                wide = values.get(head, first, stop_at, block)
                product = partial if first else mixed
                np.matmul(scores[:, first:stop_at], wide, out=product)
                if first:
                    mixed += partial
            out[start:stop, head] = mixed.reshape(-1, sharing, dim_v)

        frame.lanes.each(n_kv * n_tiles, attend)

    # a shorter view lets a lane take more rows: what is reserved for the longest must do for every one
    scores, rows = max(sharing * length, min(n * sharing * length, SCORES)), max(sharing, min(n * sharing, ROWS))
    lane_floats = scores + rows * (dim_k + 2 * dim_v) + places_at_once * max(dim_k, dim_v)
    heap_bytes = n * n_kv * (dim_k + dim_v) * 8 + site.n_lanes * rows * 8
    if any(map(is_quantized, (key_item, value_item))):  # what rounding and widening blocks take
        heap_bytes += (3 * n * n_kv + 2 * site.n_lanes * places_at_once) * max(dim_k, dim_v) * 4
    return Step(run, lane_floats, heap_bytes)


def lower_encode(site: Site) -> Step:
    """Attention among the rows of the pass. A task is one query head and some rows."""
    spec = site.op.params
    assert isinstance(spec, EncodeSpec)
    n, sharing = site.rows, spec.n_heads // spec.n_kv_heads
    tile = max(1, min(n, SCORES // n))
    n_tiles = -(-n // tile)
    reach = spec.window // 2 if spec.window else n

    def run(frame: Frame) -> None:
        q, k, v = (
            frame.values[value].reshape(n, heads, -1)
            for value, heads in zip(site.op.inputs, (spec.n_heads, spec.n_kv_heads, spec.n_kv_heads), strict=True)
        )
        out = frame.values[site.op.output].reshape(n, spec.n_heads, spec.head_dim_v)

        def attend(task: int, lane: int) -> None:
            head, start = task // n_tiles, task % n_tiles * tile
            stop = min(start + tile, n)
            first, last = max(start - reach, 0), min(stop + reach, n)  # what any of these rows sees
            cut = _Cutter(frame.work[lane])
            scores, mixed = cut(stop - start, last - first), cut(stop - start, spec.head_dim_v)
            np.matmul(q[start:stop, head], k[first:last, head // sharing].T, out=scores)
            scores *= spec.scale
            if spec.window:
                for row, its_scores in enumerate(scores, start - first):
                    its_scores[: max(row - reach, 0)] = -np.inf
                    its_scores[row + reach + 1 :] = -np.inf
            _weigh(scores)
            np.matmul(scores, v[first:last, head // sharing], out=mixed)
            out[start:stop, head] = mixed

        frame.lanes.each(spec.n_heads * n_tiles, attend)

    copied = n * max(spec.head_dim_k, spec.head_dim_v)  # where BLAS does not take a head's rows as they lie
    return Step(run, tile * (n + spec.head_dim_v), site.n_lanes * 4 * (3 * copied + 2 * tile))


class _Cache:
    """Keys or values of a layer as the arena keeps them."""

    def __init__(
        self, address: int, n_heads: int, capacity: int, dim: int, item: Item, order: str = "place_dim"
    ) -> None:
        self._item, self._turned = item, order == "dim_place"
        if is_quantized(item):
            self._cells: NDArray[Any] = at(address, (n_heads, capacity, vector_bytes(item, dim)), np.uint8)
        elif self._turned:
            self._cells = at(address, (n_heads, dim, capacity), np.float16)
        else:
            self._cells = at(address, (n_heads, capacity, dim), np.float16)
        self._dim = dim

    def put(self, places: NDArray[np.int64], new: Floats) -> None:
        """Store rows [n, heads, dimension]."""
        if self._turned:
            self._cells[:, :, places] = new.transpose(1, 2, 0)
        elif is_quantized(self._item):
            self._cells[:, places] = to_blocks(self._item, new).transpose(1, 0, 2)
        else:
            self._cells[:, places] = new.transpose(1, 0, 2)

    def get(self, head: int, first: int, stop: int, block: Floats) -> Floats:
        """Return some places of a head as float32 [places, dimension], in the memory of `block`."""
        wide = block[: (stop - first) * self._dim]
        if self._turned:
            across = wide.reshape(self._dim, stop - first)
            across[...] = self._cells[head, :, first:stop]
            return across.T
        rows = wide.reshape(stop - first, self._dim)
        if is_quantized(self._item):
            return from_blocks(self._item, self._cells[head, first:stop], rows)
        rows[...] = self._cells[head, first:stop]
        return rows


def _softmax(scores: Floats, spec: AttendSpec, mask: Floats, sharing: int) -> None:
    """Turn scores [rows * sharing, length] into weights, in place."""
    scores *= spec.scale
    if spec.softcap:
        scores /= spec.softcap
        np.tanh(scores, out=scores)
        scores *= spec.softcap
    by_row = scores.reshape(len(mask), sharing, -1)
    by_row += mask[:, None]
    _weigh(scores)


def _weigh(scores: Floats) -> None:
    """Turn scores into weights that sum up to 1 in each row, in place."""
    scores -= scores.max(axis=1, keepdims=True)
    np.exp(scores, out=scores)
    scores /= scores.sum(axis=1, keepdims=True)


class _Cutter:
    """Hands out consecutive pieces of a lane's scratch memory."""

    def __init__(self, work: Floats) -> None:
        self._work, self._at = work, 0

    def __call__(self, rows: int, width: int) -> Floats:
        piece = self._work[self._at : self._at + rows * width].reshape(rows, width)
        self._at += rows * width
        return piece
