"""An engine that reads a long prompt with its first blocks, and says which tokens of it matter; see `filtering`."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from edgelm.engine.arrays import at
from edgelm.engine.filtering import LAST, Filtering, chosen, ranked
from edgelm.engine.forward import Engine
from edgelm.engine.passes import first_width
from edgelm.errors import ContextOverflow
from edgelm.memory.arena import KVArena


class FilteredEngine(Engine):
    """Computes on the tokens that are left of a prompt; `look` says which."""

    def __init__(self, *args: Any, filtering: Filtering) -> None:
        """`args`: see `Engine`."""
        self.filtering = filtering
        super().__init__(*args, apart=(filtering.layer,))

    def look(self, ids: Sequence[int], progress: Callable[[int], None] | None = None) -> list[int]:
        """Return the indices of the tokens of a prompt that are to be kept, in order. The cache is empty afterwards.

        Reads the weights of the blocks up to the ranking one, in passes of up to `plan.chunk` tokens; `progress` is
        called with the tokens done between them, and may change the plan. Raises as `forward` does.
        """
        if len(ids) > self.plan.context:
            raise ContextOverflow(len(ids), self.plan.context)
        self.truncate(0)  # its pages are given back: the two caches are never there at the same time
        self.check(ids[: self.arena.context], 1)
        spec, n = self.filtering.spec, len(ids)
        arena = KVArena(self.filtering.looking, self.plan.context, self.arena.chunk, self.arena.layout)
        keys = np.empty((n, spec.n_kv_heads, spec.head_dim_k), np.float32)
        last = np.empty((0, spec.n_heads, spec.head_dim_k), np.float32)
        try:
            done = 0
            while done < n:
                width = first_width(n, done, self.plan.chunk)
                with self._looking(arena):
                    self._pass(ids[done : done + width], 1, final=False)
                query, key = (self.workspace.address(value) for value in self.filtering.inputs)
                keys[done : done + width] = at(key, (width, *keys.shape[1:]), np.float32)
                queries = at(query, (width, *last.shape[1:]), np.float32)
                last = np.concatenate((last, queries[-LAST:]))[-LAST:]
                done += width
                if progress is not None:
                    progress(done)
        finally:
            arena.close()
        found: list[int] = chosen(ranked(last, keys, spec), self.filtering.n_kept).tolist()
        return found

    @contextmanager
    def _looking(self, arena: KVArena) -> Iterator[None]:
        """While inside, passes end before the attention of the ranking layer, and store in `arena`."""
        before = self.arena, self._steps, self._cut
        end = next(i for i, one in enumerate(self._cut.segments) if one.layers == (self.filtering.layer,))
        cut = self._cut._replace(segments=self._cut.segments[:end], runs=self._cut.runs[:end])
        self.arena, self._steps, self._cut = arena, OrderedDict(), cut
        try:
            yield
        finally:
            self.arena, self._steps, self._cut = before
