"""Attention over the tokens that matter, and the latest: approximate, in a cache of bounded size.

A prompt is read exactly, its oldest keys and values on flash. Then each layer keeps the places that the end of the
prompt attends to most (SnapKV, arXiv:2404.14469), as many as one share of attention leaves it (`importance`); the rest
is forgotten. The answer's tokens are appended; when their room is full, a layer chooses again, so that the latest and
the heaviest stay (H2O, arXiv:2306.14048; ALISA, arXiv:2403.17312).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from edgelm.engine.filtering import ANSWER_TOKENS, FIRST, LAST, chosen, ranked
from edgelm.engine.forward import Engine
from edgelm.engine.importance import sizes_of
from edgelm.engine.ir import AttendSpec
from edgelm.engine.softmax import Part, capped, clear, merge, weigh
from edgelm.engine.spilled import Spilled, widen
from edgelm.files.blocks import Floats
from edgelm.memory.bounded import BoundedCache
from edgelm.memory.spill import SpilledCache
from edgelm.memory.spill_shape import MOST_BLOCKS, PLACES


class Important(Spilled):
    """The layers that see everything: exact while a prompt is read, bounded once `compress` was called."""

    def __init__(self, cache: SpilledCache, specs: Sequence[AttendSpec], *args: Any, n_kept: int) -> None:
        """`args`: see `Spilled`. `n_kept`: places that a layer has on average, beside those for new tokens."""
        super().__init__(cache, specs, *args)
        self._specs, self._n_kept = {spec.layer: spec for spec in specs}, n_kept
        self._asking: dict[int, Floats] = {}
        self._bounded: dict[int, BoundedCache] = {}

    @property
    def compressed(self) -> bool:
        return bool(self._bounded)

    @property
    def places(self) -> list[int]:
        """Places in use of each layer, once compressed."""
        return [self._bounded[layer].n for layer in self._specs]

    def compress(self, n_past: int) -> None:
        """Keep of the `n_past` positions what matters; give the memory back that held the newest."""
        if n_past <= self._n_kept:
            sizes = [self._n_kept] * len(self._specs)
            ranks = [np.zeros(n_past, np.float32)] * len(sizes)
        else:
            self.cache.begin(n_past, 0)
            ranks = [self._ranks(spec, n_past) for spec in self._specs.values()]
            sizes = sizes_of(ranks, self._n_kept * len(ranks), FIRST + LAST)
        # those that become smaller give memory back before the others take it
        turns = sorted(zip(sizes, self._specs, ranks, strict=True), key=lambda turn: turn[:2])
        self.cache.begin(n_past, 0, [layer for _, layer, _ in turns])
        for size, layer, rank in turns:
            places, one = chosen(rank, size), BoundedCache(self.cache.layer(layer), size + ANSWER_TOKENS)
            self._bounded[layer] = one
            for some in self.cache.blocks(layer):
                for i, (keys, values) in enumerate(zip(some.keys, some.values, strict=True), some.first):
                    mine = places[(places >= i * PLACES) & (places < (i + 1) * PLACES)] - i * PLACES
                    one.append(keys[:, mine], values[:, mine])
                self.cache.release(some)
            one.end = n_past
            self.cache.discard(layer)

    def forget(self) -> None:
        """Give the bounded caches back: the next pass begins a new prompt."""
        self._asking.clear()
        for one in self._bounded.values():
            one.close()
        self._bounded.clear()

    def begin(self, n_past: int, n_tokens: int) -> None:
        if not self._bounded:
            super().begin(n_past, n_tokens)
        for one in self._bounded.values():
            one.go_back(n_past)

    def store(self, layer: int, keys: Floats, values: Floats) -> None:
        if not self._bounded:
            super().store(layer, keys, values)
            return
        one = self._bounded[layer]
        if one.n + len(keys) > one.n_places:
            wide = one.keys.transpose(1, 0, 2).astype(np.float32)
            one.keep(chosen(ranked(self._asking[layer], wide, self._specs[layer]), one.n_places - ANSWER_TOKENS))
        one.append(keys.transpose(1, 0, 2), values.transpose(1, 0, 2))

    def attend(self, layer: int, spec: AttendSpec, q: Floats, out: Floats) -> None:
        rows = q[-LAST:].reshape(-1, spec.n_heads, spec.head_dim_k)
        self._asking[layer] = np.concatenate((self._asking.get(layer, rows[:0]), rows))[-LAST:]
        if not self._bounded:
            super().attend(layer, spec, q, out)
            return
        assert len(q) == 1, "behind a prompt tokens come one by one"
        one, queries = self._bounded[layer], q[0] * np.float32(spec.scale)
        shape = queries.shape[:2]
        whole, part = (
            Part(
                np.empty(shape, np.float32), np.empty(shape, np.float32), np.empty((*shape, out.shape[-1]), np.float32)
            )
            for _ in range(2)
        )
        clear(whole)
        for first in range(0, one.n, MOST_BLOCKS * PLACES):
            some = slice(first, first + MOST_BLOCKS * PLACES)
            scores = np.matmul(queries, widen(one.keys[:, some], self._wide[0]).swapaxes(1, 2))
            capped(scores, spec.softcap)
            weigh(scores, widen(one.values[:, some], self._wide[0]), part)
            merge(whole, part)
        np.divide(whole.mixed, whole.total[..., None], out=out[0])

    def close(self) -> None:
        self.forget()
        super().close()

    def _ranks(self, spec: AttendSpec, n: int) -> Floats:
        """Return how much the end of the prompt attends to each of its places."""
        keys = np.empty((n, spec.n_kv_heads, spec.head_dim_k), np.float32)
        for some in self.cache.blocks(spec.layer):
            for i, block in enumerate(some.keys, some.first):
                rows = keys[i * PLACES : (i + 1) * PLACES]
                rows[:] = block[:, : len(rows)].transpose(1, 0, 2)
            self.cache.release(some)
        return ranked(self._asking[spec.layer], keys, spec)


class ImportantEngine(Engine):
    """An engine whose layers that see everything are `Important`."""

    spilled: Important

    def compress(self) -> None:
        """Keep what matters of what is stored, to answer from it."""
        self.spilled.compress(self.n_past)

    def truncate(self, n_past: int) -> int:
        """Forget positions from `n_past` on, all of them once only some places are left; return how many are kept."""
        n_past = 0 if self.spilled.compressed else n_past
        self.spilled.forget()
        return super().truncate(n_past)
