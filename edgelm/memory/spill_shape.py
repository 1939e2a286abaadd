"""How a cache whose oldest positions may go to flash is divided, as a value. Knows no file and no array."""

from __future__ import annotations

from typing import NamedTuple

from edgelm.memory.arena import LayerCache
from edgelm.memory.buffer import align_up
from edgelm.sizes import KIB

PLACES = 256
"""Positions of a block. A multiple of eight, so that no block begins inside another one's page."""
READ_BYTES = 512 * KIB
"""What a read has at least, where four blocks have as much: below that flash is slower."""
MOST_BLOCKS, LEAST_BLOCKS = 4, 2
"""Blocks of a read."""
ITEM_BYTES = 2
N_READERS = 2
N_SLOTS = N_READERS + 2
"""Memory for reads: two under way, and two that are computed on."""


class Traffic(NamedTuple):
    """What went to flash and came from it."""

    written_bytes: int = 0
    read_bytes: int = 0


class SpillShape(NamedTuple):
    """Which layers may spill, for a context of how many positions; `n_blocks` of each stay in memory."""

    layers: tuple[tuple[int, LayerCache], ...]
    context: int
    n_blocks: int

    @property
    def resident(self) -> int:
        """Positions that memory holds."""
        return min(self.n_blocks * PLACES, self.context)

    @property
    def n_spilled(self) -> int:
        """Blocks of each layer that are on flash when the context is full."""
        return max(-(-self.context // PLACES) - self.n_blocks, 0)

    @property
    def step_bytes(self) -> int:
        """Memory of one block of every layer."""
        return sum(block_bytes(layer) for _, layer in self.layers)

    @property
    def memory_bytes(self) -> int:
        return self.n_blocks * self.step_bytes

    @property
    def file_bytes(self) -> int:
        """What flash may have to hold: so much is read for every token when the context is full."""
        return self.n_spilled * self.step_bytes

    @property
    def slot_bytes(self) -> int:
        return max(blocks_a_read(layer) * block_bytes(layer) for _, layer in self.layers)


def least_blocks(chunk: int) -> int:
    """Return how many blocks of a layer must stay in memory: those that a pass of `chunk` positions may write to."""
    return 1 + -(-(chunk - 1) // PLACES)


def block_bytes(layer: LayerCache) -> int:
    """Return the memory of a block: whole pages."""
    return align_up(PLACES * layer.n_kv_heads * (layer.head_dim_k + layer.head_dim_v) * ITEM_BYTES)


def blocks_a_read(layer: LayerCache) -> int:
    return min(max(-(-READ_BYTES // block_bytes(layer)), LEAST_BLOCKS), MOST_BLOCKS)


def elsewhere(layer: LayerCache) -> LayerCache:
    """Return what is left in an arena of a layer that is kept here: no bytes, and places for a single pass."""
    return layer._replace(window=1, n_kv_heads=0)
