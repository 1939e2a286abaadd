"""The logits of all rows of a pass, which lie in tiles of the vocabulary. Rows are put together when asked for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

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
