"""Keys and values that do not fit in memory: the newest positions in memory, the oldest on flash.

Positions lie in blocks of `PLACES`, each with the keys and then the values of one layer, [head, place, dimension] as
float16. A layer's newest blocks lie in a ring; what leaves the ring is written to flash once, and read back in order,
several blocks at a time and ahead of the computing, for every pass. Knows positions and bytes; no model, no attention.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from edgelm.memory.arena import LayerCache
from edgelm.memory.buffer import Buffer
from edgelm.memory.scratch import ScratchFile
from edgelm.memory.spill_shape import (
    ITEM_BYTES,
    N_READERS,
    N_SLOTS,
    PLACES,
    SpillShape,
    Traffic,
    block_bytes,
    blocks_a_read,
)
from edgelm.memory.stores import Store
from edgelm.memory.timeline import Times


class Blocks(NamedTuple):
    """Neighbouring blocks of a layer, from number `first` on: float16 [block, head, place, dimension].

    `slot`: the memory that holds them for now; None if they stay.
    """

    first: int
    keys: NDArray[np.float16]
    values: NDArray[np.float16]
    slot: int | None = None


class _Read(NamedTuple):
    layer: int
    first: int
    n_blocks: int


class SpilledCache:
    """Keys and values of the layers of `shape`. One thread computes; readers work ahead of it.

    A pass calls `begin`, then for each layer in order `store` and `blocks`. Where a pass ends, and whether positions
    were forgotten before the next, shows in the `n_past` that the next one begins with. `traffic` counts what
    went to flash and came from it.
    """

    def __init__(self, shape: SpillShape, file: ScratchFile, reads: Store, times: Times) -> None:
        """Take over `file`. `reads`: through what it is read, which may be slower."""
        self.shape, self._file, self._reads, self._times = shape, file, reads, times
        self._layers = dict(shape.layers)
        self._sizes = {layer: block_bytes(cache) for layer, cache in shape.layers}
        self._ring = Buffer(shape.memory_bytes, huge=True)
        self._slots = Buffer(N_SLOTS * shape.slot_bytes, huge=True)
        self._ring_at: dict[int, int] = {}
        self._file_at: dict[int, int] = {}
        ring_at = file_at = 0
        for layer, n_bytes in self._sizes.items():
            self._ring_at[layer], self._file_at[layer] = ring_at, file_at
            ring_at, file_at = ring_at + shape.n_blocks * n_bytes, file_at + shape.n_spilled * n_bytes
        self._first = 0  # the oldest block in memory
        self._written = 0  # positions that flash holds as they are
        self.n_past = self._end = 0
        self._n_written = self._n_read = 0
        self._pool = ThreadPoolExecutor(N_READERS, "edgelm-kv-reader")
        self._lock = threading.Lock()
        self._free = deque(range(N_SLOTS))
        self._waiting: deque[_Read] = deque()
        self._ahead: deque[tuple[_Read, int, Future[None]]] = deque()

    @property
    def traffic(self) -> Traffic:
        return Traffic(self._n_written, self._n_read)

    def begin(self, n_past: int, n_tokens: int, order: Sequence[int] = ()) -> None:
        """Make room for `n_tokens` positions after the `n_past` that are stored, and begin to read for their pass.

        `order`: the layers as the pass asks for them, if not in their own order.

        Blocks that leave memory are written now. After `n_past` went back, what memory has room for comes back to it.
        """
        self.reset()
        self._written = min(self._written, n_past)
        last = (n_past + n_tokens - 1) // PLACES
        first = max(last + 1 - self.shape.n_blocks, 0)
        if first > self._first:
            self._write_until(first)
        elif first < self._first:
            self._load(first, min(self._first, -(-n_past // PLACES)))
        self._first, self.n_past, self._end = first, n_past, n_past + n_tokens
        for layer in order or self._layers:
            self._waiting.extend(_Read(layer, *group) for group in self.groups(layer) if group[0] < first)
        with self._lock:
            self._read_ahead()

    def store(self, layer: int, keys: NDArray[np.float32], values: NDArray[np.float32]) -> None:
        """Keep the positions of the pass: [n_tokens, head, dimension], rounded to float16."""
        done = 0
        while done < len(keys):
            at = self.n_past + done
            place = at % PLACES
            n = min(PLACES - place, len(keys) - done)
            block = self._resident(layer, at // PLACES, 1)
            with np.errstate(over="ignore"):  # as in a backend that stores such numbers itself
                block.keys[0, :, place : place + n] = keys[done : done + n].transpose(1, 0, 2)
                block.values[0, :, place : place + n] = values[done : done + n].transpose(1, 0, 2)
            done += n

    def groups(self, layer: int) -> Sequence[tuple[int, int]]:
        """Return the blocks that `blocks` will yield: the first of each group, and how many."""
        step, n_blocks = blocks_a_read(self._layers[layer]), self.shape.n_blocks
        groups = [(first, min(step, self._first - first)) for first in range(0, self._first, step)]
        first, end = self._first, -(-self._end // PLACES)
        while first < end:
            n = min(step, end - first, n_blocks - first % n_blocks)  # the ring ends somewhere
            groups.append((first, n))
            first += n
        return groups

    def blocks(self, layer: int) -> Iterator[Blocks]:
        """Yield the blocks of a layer in order, those on flash as soon as they are read; each is to be released."""
        cache = self._layers[layer]
        for first, n in self.groups(layer):
            if first >= self._first:
                yield self._resident(layer, first, n)
                continue
            with self._lock:
                read, slot, done = self._ahead.popleft()
            assert (read.layer, read.first) == (layer, first), "layers are read in the order of the pass"
            if not done.done():
                began = time.perf_counter()
                done.exception()
                self._times.add("wait", layer, began)
            done.result()
            self._n_read += n * self._sizes[layer]
            yield _blocks(self._slots, slot * self.shape.slot_bytes, first, n, cache, slot)

    def release(self, blocks: Blocks) -> None:
        """Give the memory of blocks that came from flash to the next read. Safe in any thread."""
        if blocks.slot is not None:
            with self._lock:
                self._free.append(blocks.slot)
                self._read_ahead()

    def layer(self, layer: int) -> LayerCache:
        """Return what a layer stores."""
        return self._layers[layer]

    def discard(self, layer: int) -> None:
        """Give back the memory of a layer's newest blocks, of which nothing is wanted any more."""
        at = self._ring_at[layer]
        self._ring.discard(at, at + self.shape.n_blocks * self._sizes[layer])

    def reset(self) -> None:
        """Forget what was read ahead, after a pass that was broken off; waits for reads that are under way."""
        self._waiting.clear()
        for _, _, done in self._ahead:
            if not done.cancel():
                done.exception()
        self._ahead.clear()
        self._free = deque(range(N_SLOTS))

    def close(self) -> None:
        """Give memory and flash back."""
        self.reset()
        self._pool.shutdown()
        self._file.close()
        self._ring.release()
        self._slots.release()

    def _read_ahead(self) -> None:
        """Hand reads to the readers while there is memory for them. The lock is held."""
        while self._free and self._waiting:
            slot, read = self._free.popleft(), self._waiting.popleft()
            self._ahead.append((read, slot, self._pool.submit(self._fetch, read, slot)))

    def _fetch(self, read: _Read, slot: int) -> None:
        size = self._sizes[read.layer]
        n_bytes, offset = read.n_blocks * size, self._file_at[read.layer] + read.first * size
        began = self._times.begin_read()
        try:
            self._reads.read_into(0, offset, n_bytes, self._slots.view, slot * self.shape.slot_bytes)
        finally:
            self._times.end_read(read.layer, began, n_bytes)

    def _write_until(self, first: int) -> None:
        """Put the blocks before `first` on flash, those that are not there as they are."""
        for i in range(self._first, first):
            if self._written >= (i + 1) * PLACES:
                continue
            for layer, size in self._sizes.items():
                at = self._ring_place(layer, i)
                self._file.write(self._file_at[layer] + i * size, self._ring.view[at : at + size])
                self._n_written += size
            self._written = (i + 1) * PLACES

    def _load(self, first: int, stop: int) -> None:
        for i in range(first, stop):
            for layer, size in self._sizes.items():
                at, offset = self._ring_place(layer, i), self._file_at[layer] + i * size
                self._reads.read_into(0, offset, size, self._ring.view, at)
                self._n_read += size

    def _ring_place(self, layer: int, index: int) -> int:
        return self._ring_at[layer] + index % self.shape.n_blocks * self._sizes[layer]

    def _resident(self, layer: int, first: int, n: int) -> Blocks:
        return _blocks(self._ring, self._ring_place(layer, first), first, n, self._layers[layer])


def _blocks(buffer: Buffer, at: int, first: int, n: int, layer: LayerCache, slot: int | None = None) -> Blocks:
    """See memory as blocks."""
    items = block_bytes(layer) // ITEM_BYTES
    flat: NDArray[np.float16] = np.frombuffer(buffer.view, np.float16, n * items, at).reshape(n, items)
    key_items, value_items = (layer.n_kv_heads * PLACES * dim for dim in (layer.head_dim_k, layer.head_dim_v))
    keys = flat[:, :key_items].reshape(n, layer.n_kv_heads, PLACES, layer.head_dim_k)
    values = flat[:, key_items : key_items + value_items].reshape(n, layer.n_kv_heads, PLACES, layer.head_dim_v)
    return Blocks(first, keys, values, slot)
