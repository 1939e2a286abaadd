"""The logits of all rows of a pass, which lie in tiles of the vocabulary. Rows are put together when asked for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgelm.engine.largest import largest

Logits = NDArray[np.float32]


class Rows:
    """Logits of `n_rows` rows. Valid until the next pass."""

    def __init__(self, tiles: Sequence[NDArray[Any]]) -> None:
        """`tiles`: [rows, width] each, side by side over the vocabulary; float32, or what a graph gives."""
        self._tiles = tuple(tiles)
        self._whole: Logits | None = None

    def __len__(self) -> int:
        return len(self._tiles[0])

    def __getitem__(self, row: int) -> Logits:
        """Return the logits [n_vocab] of a row. Its memory may be written to, and is used again for the next one."""
        if len(self._tiles) == 1:
            only: Logits = self._tiles[0][row].astype(np.float32, copy=False)
            return only
        if self._whole is None:
            self._whole = np.empty(sum(tile.shape[1] for tile in self._tiles), np.float32)
        np.concatenate([tile[row] for tile in self._tiles], out=self._whole)
        return self._whole

    def best(self) -> NDArray[np.int64]:
        """Return the id of the largest logit of every row, the lowest among equals: int64 [rows]."""
        rows = np.arange(len(self))
        best = np.zeros(len(self), np.int64)
        highest = np.full(len(self), -np.inf, np.float32)
        first = 0
        for tile in self._tiles:
            ids = tile.argmax(axis=1)
            values = tile[rows, ids]
            better = values > highest
            best[better], highest[better] = ids[better] + first, values[better]
            first += tile.shape[1]
        return best

    def top(self, k: int) -> NDArray[np.int64]:
        """Return the ids of the `k` largest logits of every row, largest first: int64 [rows, k]."""
        return np.stack([self._top_of(row, k) for row in range(len(self))])

    def _top_of(self, row: int, k: int) -> NDArray[np.int64]:
        ids, values, first = [], [], 0
        for tile in self._tiles:
            found = largest(tile[row], min(k, tile.shape[1]))
            ids.append(found + first)
            values.append(tile[row][found])
            first += tile.shape[1]
        order = np.argsort(-np.concatenate(values), kind="stable")[:k]
        return np.concatenate(ids)[order]
