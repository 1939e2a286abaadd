"""Attention over a cache of which a part lies on flash, computed between the segments of a pass.

Blocks are taken as they come from memory or flash, and their parts of the softmax are merged, so the result does not
depend on where a block lies. Scores and sums are float32. Lanes share out the context where a pass is narrow
(LeanAttention, arXiv:2405.10480), heads and rows where it is wide.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from math import prod
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from edgelm.engine.arrays import at
from edgelm.engine.backend import Bindings, Program
from edgelm.engine.ir import AttendSpec
from edgelm.engine.lanes import BlasThreads, Lanes, quiet
from edgelm.engine.softmax import Part, capped, clear, join, merge, weigh
from edgelm.files.blocks import Floats
from edgelm.memory.spill import SpilledCache
from edgelm.memory.spill_shape import MOST_BLOCKS, PLACES

NARROW, NARROW_BYTES = 8, 4_000_000
"""Rows of the widest pass whose blocks are shared out, and the memory that the parts of all blocks may take."""
SCORES = 1 << 17
"""Scores that a lane has at a time in wide passes (512 KiB)."""
BLAS_BYTES = 1_000_000
"""What a lane takes besides: its stack, and the buffers of OpenBLAS (0.2 MB measured)."""
_EXPONENT = np.float32(2.0**112)


class Sizes(NamedTuple):
    """What passes of up to some rows need, in numbers: scaled queries, sums, and for each lane keys or values,
    scores, and the part of one block.

    `narrow`: rows of the widest pass whose blocks are shared out. `tile`: rows in one task of a wider one.
    """

    narrow: int
    tile: int
    queries: int
    sums: int
    wide: int
    scores: int
    loose: int

    @classmethod
    def of(cls, spec: AttendSpec, n_rows: int, context: int) -> Sizes:
        sharing, dim, a_part = spec.n_heads // spec.n_kv_heads, spec.head_dim_v, spec.n_heads * (spec.head_dim_v + 2)
        n_parts = -(-context // PLACES) * a_part
        narrow = max(min(NARROW_BYTES // (4 * n_parts), NARROW, n_rows), 1)
        tile = max(min(SCORES // (sharing * PLACES), n_rows), 1)
        return cls(
            narrow,
            tile,
            n_rows * spec.n_heads * spec.head_dim_k,
            max(n_parts * narrow, a_part * n_rows),
            MOST_BLOCKS * spec.n_kv_heads * PLACES * max(spec.head_dim_k, dim),
            max(MOST_BLOCKS * spec.n_heads * narrow, sharing * tile) * PLACES,
            sharing * tile * (dim + 2),
        )

    def n_bytes(self, n_lanes: int) -> int:
        lane = 4 * (self.wide + self.scores + 2 * self.loose) + BLAS_BYTES  # twice: what NumPy takes for a moment
        return 4 * (self.queries + self.sums) + n_lanes * lane


class Spilled:
    """The layers of a model whose cache may spill: their programs, and the threads that run them."""

    def __init__(
        self,
        cache: SpilledCache,
        specs: Sequence[AttendSpec],
        n_rows: int,
        n_threads: int,
        rest: Callable[[], None] | None = None,
    ) -> None:
        """Take over `cache`. `specs`: the attention of its layers; `n_rows`: of the widest pass; `rest`: `Resting`."""
        self.cache, self.rest = cache, rest or (lambda: None)
        self.layers = frozenset(layer for layer, _ in cache.shape.layers)
        self._lanes, self._blas, self._turn = Lanes(n_threads), BlasThreads(), threading.Lock()
        self._blas.hold()
        sizes = [Sizes.of(spec, n_rows, cache.shape.context) for spec in specs]
        self._n_rows = n_rows
        self._queries = np.empty(max(size.queries for size in sizes), np.float32)
        self._sums = np.empty(max(size.sums for size in sizes), np.float32)
        self._wide = [np.empty(max(size.wide for size in sizes), np.float32) for _ in range(n_threads)]
        self._loose = [np.empty(max(size.loose for size in sizes), np.float32) for _ in range(n_threads)]
        self._scores = [np.empty(max(size.scores for size in sizes), np.float32) for _ in range(n_threads)]

    def begin(self, n_past: int, n_tokens: int) -> None:
        """Prepare for a pass, see `SpilledCache.begin`."""
        self.cache.begin(n_past, n_tokens)

    def store(self, layer: int, keys: Floats, values: Floats) -> None:
        """Keep keys and values of the pass, see `SpilledCache.store`."""
        self.cache.store(layer, keys, values)

    def program(self, layer: int, spec: AttendSpec, n_tokens: int) -> Program:
        """Return what computes `attend` of a layer in passes of `n_tokens`: stores k and v, then mixes the values."""
        return _Attend(self, layer, spec, n_tokens)

    def abort(self, on: bool) -> None:
        """Make running and later programs raise `Cancelled` while on. Called from any thread."""
        self._lanes.aborted = on

    def close(self) -> None:
        """Give all memory back."""
        self._lanes.close()
        self._blas.release()
        self.cache.close()

    def attend(self, layer: int, spec: AttendSpec, q: Floats, out: Floats) -> None:
        """Fill `out` [n, n_kv_heads, sharing, dim_v] with the attention of q [n, n_kv_heads, sharing, dim_k]."""
        n, n_kv, sharing, dim_k = q.shape
        queries = self._queries[: q.size].reshape(n_kv, n, sharing, dim_k)
        np.multiply(q.transpose(1, 0, 2, 3), np.float32(spec.scale), out=queries)
        sizes = Sizes.of(spec, self._n_rows, self.cache.shape.context)
        attend = self._share_blocks if n <= sizes.narrow else self._share_rows
        whole = attend(layer, spec, queries, sizes.tile)
        mixed = whole.mixed.reshape(n_kv, n, sharing, spec.head_dim_v).transpose(1, 0, 2, 3)
        np.divide(mixed, whole.total.reshape(n_kv, n, sharing, 1).transpose(1, 0, 2, 3), out=out)

    def _share_blocks(self, layer: int, spec: AttendSpec, queries: Floats, tile: int) -> Part:
        """Let each lane take the next blocks with all heads; the parts of all blocks are joined at the end."""
        n_kv, n, sharing, dim = queries.shape
        groups, blocks = self.cache.groups(layer), self.cache.blocks(layer)
        first, n_blocks = groups[-1]
        parts = _split(self._sums, (first + n_blocks, n_kv, n * sharing), spec.head_dim_v)

        def add(_: int, lane: int) -> None:
            with self._turn:
                some = next(blocks)
            own, size = slice(some.first, some.first + len(some.keys)), some.keys.shape[:3]
            keys = widen(some.keys, self._wide[lane]).swapaxes(2, 3)
            scores = _reshaped(self._scores[lane], (size[0], n_kv, n * sharing, PLACES))
            np.matmul(queries.reshape(n_kv, n * sharing, dim), keys, out=scores)
            _finish_scores(scores, spec, some.first, n, self.cache.n_past)
            weigh(scores, widen(some.values, self._wide[lane]), Part(*(numbers[own] for numbers in parts)))
            self.cache.release(some)

        self._lanes.each(len(groups), add)
        return join(parts)

    def _share_rows(self, layer: int, spec: AttendSpec, queries: Floats, tile: int) -> Part:
        """Let each lane take some rows of a head, block after block."""
        n_kv, n, sharing, dim = queries.shape
        whole, n_tiles = _split(self._sums, (n_kv, n * sharing), spec.head_dim_v), -(-n // tile)
        clear(whole)

        def add(task: int, lane: int) -> None:
            head, start = task // n_tiles, task % n_tiles * tile
            rows = min(start + tile, n) - start
            own = slice(start * sharing, (start + rows) * sharing)
            into, mine = Part(*(numbers[head, own] for numbers in whole)), queries[head, start : start + rows]
            scores, wide = _reshaped(self._scores[lane], (1, 1, rows * sharing, PLACES)), self._wide[lane]
            part = _split(self._loose[lane], (rows * sharing,), spec.head_dim_v)
            for i, (keys, values) in enumerate(zip(some.keys[:, head], some.values[:, head], strict=True)):
                np.matmul(mine.reshape(-1, dim), widen(keys, wide).T, out=scores[0, 0])
                if not _finish_scores(scores, spec, some.first + i, rows, self.cache.n_past + start):
                    break
                weigh(scores[0, 0], widen(values, wide), part)
                merge(into, part)

        for some in self.cache.blocks(layer):
            self._lanes.each(n_kv * n_tiles, add)
            self.cache.release(some)
        return whole


class _Attend:
    """The program of one layer and one width."""

    def __init__(self, spilled: Spilled, layer: int, spec: AttendSpec, n_tokens: int) -> None:
        self._spilled, self._layer, self._spec, self._n = spilled, layer, spec, n_tokens

    def run(self, bindings: Bindings) -> None:
        spec, n = self._spec, self._n
        n_kv, sharing = spec.n_kv_heads, spec.n_heads // spec.n_kv_heads
        query, key, value = bindings.inputs
        keys = at(key, (n, n_kv, spec.head_dim_k), np.float32)
        self._spilled.store(self._layer, keys, at(value, (n, n_kv, spec.head_dim_v), np.float32))
        q = at(query, (n, n_kv, sharing, spec.head_dim_k), np.float32)
        out = at(bindings.outputs[0], (n, n_kv, sharing, spec.head_dim_v), np.float32)
        self._spilled.rest()
        with quiet():
            self._spilled.attend(self._layer, spec, q, out)


def widen(numbers: NDArray[np.float16], out: Floats) -> Floats:
    """Return float16 as float32, in `out`: three times as fast as NumPy's own conversion, and exact.

    The bits of exponent and mantissa are moved to their places; the exponent's bias is made up for by a product, which
    also gets denormal numbers right. What is infinite or no number becomes 65,536 or more, so that what nobody has
    written yet does no harm behind a mask.
    """
    wide = _reshaped(out, numbers.shape)
    bits = wide.view(np.int32)
    np.left_shift(numbers.view(np.int16), 13, out=bits, dtype=np.int32)
    np.bitwise_and(bits, np.int32(-0x70000001), out=bits)
    np.multiply(wide, _EXPONENT, out=wide)
    return wide


def _finish_scores(scores: Floats, spec: AttendSpec, first: int, n: int, n_past: int) -> bool:
    """Cap the scores [block, head, rows * sharing, place], and hide from each of `n` rows what comes after it.

    The first block is number `first`, the first row position `n_past`. False if nobody sees anything.
    """
    start, n_places = first * PLACES, len(scores) * PLACES
    if start > n_past + n - 1:
        return False
    capped(scores, spec.softcap)
    if start + n_places > n_past + 1:
        places = np.arange(start, start + n_places).reshape(len(scores), 1, 1, 1, PLACES)
        hidden = places > np.arange(n_past, n_past + n)[:, None, None]
        np.copyto(scores.reshape(*scores.shape[:2], n, -1, PLACES), -np.inf, where=hidden)
    return True


def _reshaped(numbers: Floats, shape: tuple[int, ...]) -> Floats:
    return numbers[: prod(shape)].reshape(shape)


def _split(numbers: Floats, shape: tuple[int, ...], dim: int) -> Part:
    size = prod(shape)
    top, total, mixed = numbers[:size], numbers[size : 2 * size], numbers[2 * size : (2 + dim) * size]
    return Part(top.reshape(shape), total.reshape(shape), mixed.reshape(*shape, dim))
