"""The small memory of a pass: values between segments, inputs, masks, gathered rows and logits.

One buffer, laid out once for the widest pass.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from edgelm.engine.segments import Cut, LogitTile
from edgelm.memory.buffer import PAGE, Buffer, align_up
from edgelm.memory.stores import span

ALIGN = 64
FLOAT_BYTES = 4


class Layout(NamedTuple):
    """Where values that cross segments lie, in floats per row: `offsets[value]`, and `width` in all.

    Values whose lives do not overlap share a place.
    """

    offsets: Mapping[int, int]
    width: int

    @classmethod
    def of(cls, cut: Cut) -> Layout:
        """Lay the crossing values of a pass out, each in the first gap that is free while it lives."""
        tiles = {tile.value for tile in cut.tiles}
        born: dict[int, int] = {}
        dies: dict[int, int] = {}
        for i, placed in enumerate(cut.segments):
            for value in placed.outputs:
                born[value] = dies[value] = i
            for value in placed.inputs:
                dies[value] = i
        offsets: dict[int, int] = {}
        for value in sorted(born, key=lambda value: (born[value], value)):
            if value in tiles:
                continue
            width = align_up(cut.values[value].width, ALIGN // FLOAT_BYTES)
            alive = sorted(
                (offsets[other], align_up(cut.values[other].width, ALIGN // FLOAT_BYTES))
                for other in offsets
                if dies[other] >= born[value]
            )
            at = 0
            for start, taken in alive:
                if at + width <= start:
                    break
                at = max(at, start + taken)
            offsets[value] = at
        ends = (at + align_up(cut.values[value].width, ALIGN // FLOAT_BYTES) for value, at in offsets.items())
        return cls(offsets, max(ends, default=0))


def workspace_bytes(
    width: int, n_rows: int, n_outputs: int, n_vocab: int, row_bytes: int, places: Mapping[int, int]
) -> int:
    """Return the memory of a `Workspace`."""
    return sum(_sizes(width, n_rows, n_outputs, n_vocab, row_bytes, places)) + span(PAGE - 1, row_bytes)


def _sizes(
    width: int, n_rows: int, n_outputs: int, n_vocab: int, row_bytes: int, places: Mapping[int, int]
) -> list[int]:
    sizes = [width * n_rows * 4, n_outputs * n_vocab * 4, n_rows * row_bytes, n_rows * 4, n_outputs * 4]
    for n_places in places.values():
        sizes += [n_rows * 8, n_rows * n_places * 4]
    return [align_up(size, ALIGN) for size in sizes]


class Workspace:
    """Addresses and arrays of a pass. `places` maps each cache group to the places it has."""

    def __init__(
        self, layout: Layout, n_rows: int, n_outputs: int, n_vocab: int, row_bytes: int, places: Mapping[int, int]
    ) -> None:
        sizes = _sizes(layout.width, n_rows, n_outputs, n_vocab, row_bytes, places)
        self._layout, self._n_rows, self._n_vocab = layout, n_rows, n_vocab
        self._buffer = Buffer(sum(sizes), huge=False)
        self.row_buffer = Buffer(span(PAGE - 1, row_bytes))
        starts = list(accumulate(sizes, initial=0))
        base = self._buffer.address
        self._values_address, self._logits_address, self.rows_address = (base + start for start in starts[:3])
        self.positions_address, self.out_rows_address = base + starts[3], base + starts[4]
        self._logits_start = starts[1]
        view = self._buffer.view
        self.positions: NDArray[np.int32] = np.frombuffer(view, np.int32, n_rows, starts[3])
        self.out_rows: NDArray[np.int32] = np.frombuffer(view, np.int32, n_outputs, starts[4])
        self.places: dict[int, NDArray[np.int64]] = {}
        self.places_addresses: dict[int, int] = {}
        self.mask_addresses: dict[int, int] = {}
        self._masks: dict[int, NDArray[np.float32]] = {}
        for i, (group, n_places) in enumerate(places.items()):
            start, mask = starts[5 + 2 * i], starts[6 + 2 * i]
            self.places[group] = np.frombuffer(view, np.int64, n_rows, start)
            self._masks[group] = np.frombuffer(view, np.float32, n_rows * n_places, mask)
            self.places_addresses[group], self.mask_addresses[group] = base + start, base + mask

    def address(self, value: int) -> int:
        """Return where a value that crosses segments lies, for passes of any width."""
        return self._values_address + self._layout.offsets[value] * self._n_rows * FLOAT_BYTES

    def output(self, value: int, tiles: Sequence[LogitTile], n_outputs: int) -> int:
        """Return where a segment writes `value`: among the crossing values, or its tile of the logits."""
        for tile in tiles:
            if tile.value == value:
                return self._logits_address + tile.first * n_outputs * FLOAT_BYTES
        return self.address(value)

    def mask(self, group: int, n_tokens: int, length: int) -> NDArray[np.float32]:
        """Return the mask of a group as [n_tokens, length]."""
        return self._masks[group][: n_tokens * length].reshape(n_tokens, length)

    def logits(self, tiles: Sequence[LogitTile], n_outputs: int) -> NDArray[np.float32]:
        """Return the logits as [n_outputs, n_vocab]; each tile lies by itself, so more than one row is put together."""
        blocks = self.tiles(tiles, n_outputs)
        return blocks[0] if len(blocks) == 1 else np.concatenate(blocks, axis=1)

    def tiles(self, tiles: Sequence[LogitTile], n_outputs: int) -> list[NDArray[np.float32]]:
        """Return the tiles of the logits, each [n_outputs, width]; those of a single row are one."""
        flat = np.frombuffer(self._buffer.view, np.float32, n_outputs * self._n_vocab, self._logits_start)
        if n_outputs == 1 or len(tiles) == 1:
            return [flat.reshape(n_outputs, self._n_vocab)]
        return [
            flat[tile.first * n_outputs :][: tile.width * n_outputs].reshape(n_outputs, tile.width) for tile in tiles
        ]

    def close(self) -> None:
        for name in ("positions", "out_rows", "places", "_masks"):
            delattr(self, name)
        self._buffer.release()
        self.row_buffer.release()
