"""How the rows of a pass stand to each other: one after the other, as a tree of guesses, or as answers side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from edgelm.errors import ContextOverflow
from edgelm.memory.arena import KVArena, depths, is_chain


class Claim(Protocol):
    """The rows of one pass."""

    branches: bool
    """Whether rows do not simply follow each other."""

    def positions(self, n_past: int) -> NDArray[np.int32]: ...

    def place(self, arena: KVArena, group: int, places: NDArray[np.int64], mask: NDArray[np.float32]) -> None: ...


class Guesses:
    """A tree: `parents[i]` is the row before row i, -1 the last stored position."""

    def __init__(self, parents: Sequence[int]) -> None:
        self._parents = parents
        self.branches = not is_chain(parents)

    def positions(self, n_past: int) -> NDArray[np.int32]:
        return n_past + depths(self._parents)

    def place(self, arena: KVArena, group: int, places: NDArray[np.int64], mask: NDArray[np.float32]) -> None:
        if self.branches:
            arena.claim_tree(group, self._parents, places, mask)
        else:
            arena.claim(group, len(self._parents), places, mask)


class SideBySide:
    """Several answers to one prompt: they share its keys and values, and each sees its own tokens besides.

    Every pass has one row for each answer that goes on; rows take places in the order of the passes, so that all
    answers together take as many as they have tokens.
    """

    branches = True

    def __init__(self, arena: KVArena, n: int) -> None:
        self._n_prompt = arena.n_past
        self._lengths = np.zeros(n, np.int32)
        self._owners = {group: np.full(arena.most_places(group), -1, np.int32) for group in arena.windows}
        self._rows = np.empty(0, np.int64)

    def take(self, arena: KVArena, answers: Sequence[int]) -> None:
        """Say which answers the next pass has tokens of. Raises `ContextOverflow` if a window has no place left."""
        self._rows = np.asarray(answers, np.int64)
        needed = arena.n_past + len(answers)
        for group, window in arena.windows.items():
            first_seen = max(self._n_prompt + int(self._lengths[self._rows].min()) - window + 1, 0) if window else 0
            if needed - first_seen > arena.most_places(group):
                raise ContextOverflow(needed, first_seen + arena.most_places(group))

    def positions(self, n_past: int) -> NDArray[np.int32]:
        return self._n_prompt + self._lengths[self._rows]

    def place(self, arena: KVArena, group: int, places: NDArray[np.int64], mask: NDArray[np.float32]) -> None:
        held, owners = arena.places_of(group), self._owners[group]
        n, window = len(self._rows), arena.windows[group]
        np.remainder(np.arange(arena.n_past, arena.n_past + n), len(held), out=places)
        positions = self.positions(arena.n_past)
        held[places], owners[places] = positions, self._rows
        seen, theirs = held[: mask.shape[1]], owners[: mask.shape[1]]
        last = positions[:, None]
        first = np.maximum(last - window + 1, 0) if window else 0
        own = (theirs == self._rows[:, None]) | ((theirs < 0) & (seen < self._n_prompt))
        mask.fill(-np.inf)
        np.copyto(mask, 0.0, where=own & (seen >= first) & (seen <= last) & (seen >= 0))

    def passed(self) -> None:
        """The pass is done."""
        self._lengths[self._rows] += 1
