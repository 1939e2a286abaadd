"""How the rows of a pass stand to each other: one after the other, as a tree of guesses, or as answers side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

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

    def take(self, answers: Sequence[int]) -> None:
        """Say which answers the next pass has tokens of, each once."""
        self._rows = np.asarray(answers, np.int64)

    def positions(self, n_past: int) -> NDArray[np.int32]:
        return self._n_prompt + self._lengths[self._rows]

    def place(self, arena: KVArena, group: int, places: NDArray[np.int64], mask: NDArray[np.float32]) -> None:
        held, owners = arena.places_of(group), self._owners[group]
        n, window = len(self._rows), arena.windows[group]
        np.remainder(np.arange(arena.n_past, arena.n_past + n), len(held), out=places)
        positions = self.positions(arena.n_past)
        last = positions[:, None]
        first = np.maximum(last - window + 1, 0) if window else np.zeros_like(last)
        taken, theirs = held[places], owners[places]
        own = (theirs == self._rows[:, None]) | ((theirs < 0) & (taken < self._n_prompt))
        assert not (own & (taken >= first)).any(), "a ring has too few places: see `tokens_each`"
        held[places], owners[places] = positions, self._rows
        seen, theirs = held[: mask.shape[1]], owners[: mask.shape[1]]
        own = (theirs == self._rows[:, None]) | ((theirs < 0) & (seen < self._n_prompt))
        mask.fill(-np.inf)
        np.copyto(mask, 0.0, where=own & (seen >= first) & (seen <= last) & (seen >= 0))

    def passed(self) -> None:
        """The pass is done."""
        self._lengths[self._rows] += 1


def tokens_each(arena: KVArena, n_prompt: int, n: int) -> tuple[int, int]:
    """Return how many tokens each of `n` answers to a prompt can store: as the context has room, and as rings have.

    A ring holds the end of the prompt until every answer has passed it, and a window of each answer after that.
    """
    in_context, in_rings = (arena.context - n_prompt) // n, arena.context
    for group, window in arena.windows.items():
        places = arena.most_places(group)
        if window and places < arena.context and (places := places - n) < n * window:  # a pass may be cut in two
            in_rings = min(in_rings, max((places - n_prompt) // n, (places - window) // (n - 1)))
    return in_context, in_rings
