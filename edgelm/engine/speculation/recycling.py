"""Guess from what the model itself thought likely after the same token before: Token Recycling (arXiv:2408.08696).

A short row of successors for each token seen, the likeliest first, overwritten by every pass that computes it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import NDArray

from edgelm.engine.speculation.chances import Chances
from edgelm.engine.speculation.drafts import Guess

SUCCESSORS = 8
MOST_TOKENS = 8192
"""Tokens whose successors are kept, the ones not met for longest go first: under 2 MB with what Python adds."""
TABLE_BYTES = 2_000_000
_FIRST = (0.35, 0.12, 0.06, 0.04, 0.03, 0.02, 0.015, 0.01)
"""How often the successor of each rank came next; a first estimate."""
_DEEP = 3


class Recycling:
    """The table of successors, and guesses from it."""

    def __init__(self, chances: Chances) -> None:
        self._chances = chances
        self._rows: OrderedDict[int, bytes] = OrderedDict()
        self._newest = -1

    def begin(self, ids: Sequence[int]) -> None:
        self._newest = ids[-1] if ids else -1

    def append(self, token: int) -> None:
        self._newest = token

    def propose(self, path: Sequence[int]) -> Sequence[Guess]:
        """Return the successors of the last token of the path."""
        row = self._rows.get(path[-1] if path else self._newest)
        if row is None:
            return ()
        depth = min(len(path), _DEEP)
        guesses = []
        for rank, token in enumerate(memoryview(row).cast("I")):
            key: Hashable = ("recycled", rank, depth)
            guesses.append(Guess(token, key, self._chances.of(key, _FIRST[rank])))
        return guesses

    @property
    def table(self) -> NDArray[np.uint32]:
        """Tokens with what came after them: [n, 1 + SUCCESSORS], the ones not met for longest first."""
        rows = [np.frombuffer(row, np.uint32) for row in self._rows.values()]
        tokens = np.fromiter(self._rows, np.uint32, len(rows))
        return np.column_stack([tokens, *(np.reshape(rows, (-1, SUCCESSORS)).T)])

    @table.setter
    def table(self, table: NDArray[np.uint32]) -> None:
        self._rows = OrderedDict((int(row[0]), row[1:].tobytes()) for row in table)

    def learn(self, token: int, successors: NDArray[np.int64]) -> None:
        """Remember the `SUCCESSORS` ids that the model ranked first after `token`."""
        self._rows[token] = successors.astype(np.uint32).tobytes()
        self._rows.move_to_end(token)
        if len(self._rows) > MOST_TOKENS:
            self._rows.popitem(last=False)
