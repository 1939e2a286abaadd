"""What a guess is: tokens that may follow, as a tree, with how likely each is to be right. Knows no model."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import NamedTuple, Protocol

ROOT = -1


class Guess(NamedTuple):
    """A token that may come next. `chances` are kept for each `key`: guesses of one kind share their fate."""

    token: int
    key: Hashable
    chance: float


class Draft(NamedTuple):
    """A tree of guesses below the newest token, parents before children.

    `parents[i]` is the node before node i, or `ROOT`. `keys[i]` says which kind of guess it was.
    """

    ids: tuple[int, ...] = ()
    parents: tuple[int, ...] = ()
    keys: tuple[Hashable, ...] = ()

    def children(self, parent: int) -> list[int]:
        return [node for node, above in enumerate(self.parents) if above == parent]


NOTHING = Draft()


class Drafter(Protocol):
    """Guesses what follows a text of ids. Told of every id of it, in order."""

    def begin(self, ids: Sequence[int]) -> None:
        """Take these ids as the text so far."""

    def append(self, token: int) -> None:
        """Go on with the text."""

    def propose(self, path: Sequence[int]) -> Sequence[Guess]:
        """Return guesses for what follows the text and `path`, guesses of this round that come after it.

        The likeliest first. `path` is empty, or one that this round's proposals led to.
        """
