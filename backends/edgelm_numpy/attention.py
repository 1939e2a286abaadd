"""The operation `attend`: write keys and values into the cache, then attention over it.

A task is one key-value head and some rows of queries; keys and values become float32 a few places at a time, scores
are kept whole. Softmax is computed in float32.
"""

from __future__ import annotations

import numpy as np

from edgelm.engine.ir import AttendSpec
from edgelm.files.blocks import Floats
from edgelm_numpy.frame import Frame, Site, Step, at

SCORES = 1 << 17
"""Scores that a lane keeps (512 KiB), if a single row of queries does not need more."""
PLACES = 512
"""Places of the cache that are float32 at a time."""


def lower_attend(site: Site) -> Step:
    spec = site.op.params
    assert isinstance(spec, AttendSpec)
    n, cache = site.rows, site.shape.groups[spec.group]
    n_kv, dim_k, dim_v, length = spec.n_kv_heads, spec.head_dim_k, spec.head_dim_v, cache.length
    sharing = spec.n_heads // n_kv
    tile = max(1, min(n, SCORES // (sharing * length)))
    n_tiles = -(-n // tile)
    places_at_once = min(PLACES, length)

    def run(frame: Frame) -> None:
        q, k, v = (frame.values[value] for value in site.op.inputs)
        out = frame.values[site.op.output].reshape(n, n_kv, sharing, dim_v)
        bound = frame.bindings
        keys = at(bound.keys[spec.layer], (n_kv, cache.capacity, dim_k), np.float16)
        values = at(bound.values[spec.layer], (n_kv, dim_v, cache.capacity), np.float16)
        places = at(bound.places[spec.group], (n,), np.int64)
        mask = at(bound.masks[spec.group], (n, length), np.float32)
        keys[:, places] = k.reshape(n, n_kv, dim_k).transpose(1, 0, 2)
        values[:, :, places] = v.reshape(n, n_kv, dim_v).transpose(1, 2, 0)
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
                some = keys[head, first : min(first + places_at_once, length)]
                wide = block[: some.size].reshape(some.shape)
                wide[...] = some
                np.matmul(queries, wide.T, out=scores[:, first : first + len(some)])
            _softmax(scores, spec, mask[start:stop], sharing)
            for first in range(0, length, places_at_once):
                some = values[head, :, first : min(first + places_at_once, length)]
                wide = block[: some.size].reshape(some.shape)
                wide[...] = some
                product = partial if first else mixed
                np.matmul(scores[:, first : first + some.shape[1]], wide.T, out=product)
                if first:
                    mixed += partial
            out[start:stop, head] = mixed.reshape(-1, sharing, dim_v)

        frame.lanes.each(n_kv * n_tiles, attend)

    rows = tile * sharing
    lane_floats = rows * (dim_k + length + 2 * dim_v) + places_at_once * max(dim_k, dim_v)
    return Step(run, lane_floats, n * n_kv * (dim_k + dim_v) * 8 + site.n_lanes * rows * 8)


def _softmax(scores: Floats, spec: AttendSpec, mask: Floats, sharing: int) -> None:
    """Turn scores [rows * sharing, length] into weights, in place."""
    scores *= spec.scale
    if spec.softcap:
        scores /= spec.softcap
        np.tanh(scores, out=scores)
        scores *= spec.softcap
    by_row = scores.reshape(len(mask), sharing, -1)
    by_row += mask[:, None]
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
