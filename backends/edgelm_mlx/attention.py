"""The operation `attend`: attention over the cache and the new rows; the new rows are written to the cache.

The cache belongs to the arena, so each pass copies what it sees of a layer into MLX, a few heads at a time, and puts
the new rows into the copy; into the cache they go once they are computed.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from edgelm.engine.ir import AttendSpec
from edgelm_mlx.frame import Frame, Site, Step, at
from edgelm_mlx.runtime import Array

_COPIES = 4
"""Arrays as large as the scores that softmax and what surrounds it may make."""


def lower_attend(site: Site) -> Step:
    spec = site.op.params
    assert isinstance(spec, AttendSpec)
    n, cache = site.rows, site.shape.groups[spec.group]
    n_kv, dim_k, dim_v, length = spec.n_kv_heads, spec.head_dim_k, spec.head_dim_v, cache.length
    sharing = spec.n_heads // n_kv
    # of a head, in float16: what is copied, in order, the copy, and that with the new rows; and the last as float32
    head_bytes = (3 * 2 + 4) * (length + n) * (dim_k + dim_v)
    heads = min(max(site.limits.flush_bytes // head_bytes, 1), n_kv)
    row_bytes = _COPIES * 4 * heads * sharing * (length + dim_k + dim_v)
    tile = min(max(site.limits.flush_bytes // row_bytes, 1), n)

    def run(frame: Frame) -> None:
        mx, bound = frame.mx, frame.bindings
        q, k, v = (frame.values[value] for value in site.op.inputs)
        q = q.reshape(n, n_kv, sharing, dim_k).transpose(1, 2, 0, 3)
        k = k.reshape(n, n_kv, dim_k).transpose(1, 0, 2).astype(mx.float16)
        v = v.reshape(n, n_kv, dim_v).transpose(1, 0, 2).astype(mx.float16)
        keys = at(bound.keys[spec.layer], (n_kv, cache.capacity, dim_k), np.float16)
        values = at(bound.values[spec.layer], (n_kv, cache.capacity, dim_v), np.float16)
        places = at(bound.places[spec.group], (n,), np.int64)
        mask = mx.array(at(bound.masks[spec.group], (n, length), np.float32))
        frame.write_later(k, keys, (slice(None), places))
        frame.write_later(v, values, (slice(None), places))
        frame.made(2 * n * n_kv * (dim_k + dim_v) + mask.nbytes, alive=[mask])
        mixed: list[Array] = []
        for first in range(0, n_kv, heads):
            some = slice(first, first + heads)
            seen_k, seen_v = frame.copied(keys[some, :length]), frame.copied(values[some, :length])
            seen_k[:, mx.array(places)], seen_v[:, mx.array(places)] = k[some], v[some]
            seen_k, seen_v = seen_k.astype(mx.float32), seen_v.astype(mx.float32)
            frame.made(heads * head_bytes, alive=[mask, seen_k, seen_v, *mixed])
            rows = []
            for start in range(0, n, tile):
                part = slice(start, start + tile)
                rows.append(_attend(mx, q[some, :, part], seen_k, seen_v, mask[part], spec))
                frame.made(min(tile, n - start) * row_bytes, alive=[mask, seen_k, seen_v, *mixed, *rows])
            mixed.append(mx.concatenate(rows, axis=2) if len(rows) > 1 else rows[0])
        out = mx.concatenate(mixed, axis=0) if len(mixed) > 1 else mixed[0]
        frame.values[site.op.output] = out.transpose(2, 0, 1, 3).reshape(n, site.width)
        frame.made(3 * site.out_bytes)

    kept_bytes = 4 * n * length + heads * head_bytes // 2 + 2 * site.out_bytes + 2 * n * n_kv * (dim_k + dim_v)
    return Step(run, kept_bytes + max(heads * head_bytes, tile * row_bytes, 3 * site.out_bytes))


def _attend(mx: Any, q: Array, k: Array, v: Array, mask: Array, spec: AttendSpec) -> Array:
    """Attention of q [heads, sharing, rows, dim_k] over k, v [heads, places, dim]; mask [rows, places]."""
    heads, sharing, rows, _ = q.shape
    if not spec.softcap:
        merged = q.reshape(1, heads * sharing, rows, -1)
        out = mx.fast.scaled_dot_product_attention(merged, k[None], v[None], scale=spec.scale, mask=mask)
        return out.reshape(heads, sharing, rows, -1)
    scores = mx.matmul(q, k[:, None].swapaxes(2, 3)) * spec.scale
    scores = mx.tanh(scores / spec.softcap) * spec.softcap + mask
    return mx.matmul(mx.softmax(scores, axis=-1), v[:, None])
