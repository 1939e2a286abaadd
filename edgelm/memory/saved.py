"""Keys and values in a file: written once, read back by another process, whatever backend it computes with.

magic, length of the header, header (JSON: version, whose, which layers, how many positions, of which types), the ids,
then layer by layer the keys and the values of 128 positions at a time as [position, head, dimension], and a checksum of
all of it. Quantized ones are written as their blocks, so that nothing is rounded twice. Reading and writing take memory
for one such block, and leave nothing in the page cache.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from edgelm.errors import ConfigError
from edgelm.files.errors import DamagedCache
from edgelm.files.quantize import from_blocks, to_blocks
from edgelm.files.writing import whole_or_nothing
from edgelm.memory.arena import KVArena, LayerCache
from edgelm.memory.cache_layout import BLOCK, ITEMS, Item, is_quantized, vector_bytes
from edgelm.memory.cells import Numbers
from edgelm.memory.platform import current_platform
from edgelm.memory.uncached import uncached

MAGIC, VERSION = b"edgelmKV", 2
_BLOCK = 128
_MOST_HEADER = 1 << 20
_FLOATS: dict[str, np.dtype[Any]] = {"f16": np.dtype("<f2"), "f32": np.dtype("<f4")}


class _Head(NamedTuple):
    """The header of such a file.

    `firsts`: the first stored position of each layer (rings have forgotten those before), `items`: the types of keys
    and values.
    """

    identity: str
    n: int
    layers: tuple[LayerCache, ...]
    firsts: tuple[int, ...]
    items: tuple[Item, Item]


class _Checked:
    """A file whose bytes are summed up as they pass."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        try:
            import xxhash
        except ImportError as error:
            raise ConfigError(
                f"keys and values cannot be saved or read here: their checksum needs the xxhash library ({error}); "
                "run `pip install xxhash`, or have them computed again"
            ) from error
        self.path, self._file, self.sum = path, file, xxhash.xxh3_64()

    def write(self, data: bytes | memoryview) -> None:
        self.sum.update(data)
        self._file.write(data)

    def read(self, n_bytes: int) -> bytes:
        data = self._file.read(n_bytes)
        if len(data) != n_bytes:
            raise DamagedCache(self.path, "it ends too early")
        self.sum.update(data)
        return data


def save(path: Path, arena: KVArena, ids: Sequence[int], identity: str) -> int:
    """Write what the cache stores of `ids`, which is all of it; return the bytes. `identity`: of the model.

    Only its owner can read the file. One that is there already is replaced once the new one is on the disk.
    """
    layers, n, items = arena.layers, arena.n_past, arena.layout.items
    assert n == len(ids), "every stored position has an id"
    firsts = [int(n - len(arena.held(layer))) for layer in range(len(layers))]
    header = {"version": VERSION, "identity": identity, "n": n, "layers": layers, "firsts": firsts, "items": items}
    text = json.dumps(header).encode()
    with whole_or_nothing(path, private=True) as raw:
        file = _Checked(path, raw)
        file.write(MAGIC + struct.pack("<I", len(text)) + text + np.asarray(ids, "<i4").tobytes())
        for layer, first_held in enumerate(firsts):
            for first in range(first_held, n, _BLOCK):
                pair = arena.export(layer, first, min(_BLOCK, n - first))
                for item, numbers in zip(items, pair, strict=True):
                    quantized = is_quantized(item)
                    file.write((to_blocks(item, numbers) if quantized else numbers.astype(_FLOATS[item])).tobytes())
        raw.write(file.sum.digest())
        raw.flush()
        os.fsync(raw.fileno())
        current_platform().drop_cache(raw.fileno())
        return raw.tell()


def load(path: Path, arena: KVArena, identity: str) -> tuple[int, ...]:
    """Fill an arena with what was saved; return the ids. The arena is empty afterwards if it cannot be.

    Raises `DamagedCache` for a file that is not whole, of another model, or of a cache that kept fewer bits: what is
    computed from it would not be what this cache promises.
    """
    arena.truncate(0)
    try:
        with uncached([path]), path.open("rb") as raw:
            file = _Checked(path, raw)
            head = _head(file)
            if head.identity != identity or head.layers != arena.layers:
                raise DamagedCache(file.path, "it is of another model")
            pairs = zip(head.items, arena.layout.items, strict=True)
            if any(is_quantized(theirs) and theirs != ours for theirs, ours in pairs):
                theirs, ours = (":".join(dict.fromkeys(items)) for items in (head.items, arena.layout.items))
                raise DamagedCache(file.path, f"it was kept as {theirs}, and this cache keeps {ours}")
            if head.n > arena.context:
                raise DamagedCache(file.path, f"its {head.n} tokens are more than the context of {arena.context}")
            ids = np.frombuffer(file.read(4 * head.n), "<i4").tolist()
            try:
                arena.restore(head.n, head.firsts)
            except ValueError as error:
                raise DamagedCache(file.path, str(error)) from error
            for layer in range(len(head.layers)):
                _read_layer(file, arena, layer, head)
            digest = file.sum.digest()
            if raw.read(len(digest) + 1) != digest:
                raise DamagedCache(file.path, "its checksum is wrong")
    except BaseException:
        arena.truncate(0)
        raise
    return tuple(ids)


def _read_layer(file: _Checked, arena: KVArena, layer: int, head: _Head) -> None:
    facts, n = head.layers[layer], head.n
    held = arena.held(layer)
    least = int(held[0]) if len(held) else n  # a narrower ring has no place for the oldest
    for first in range(head.firsts[layer], n, _BLOCK):
        count = min(_BLOCK, n - first)
        pair = []
        for item, dim in zip(head.items, (facts.head_dim_k, facts.head_dim_v), strict=True):
            n_rows = count * facts.n_kv_heads
            data = file.read(n_rows * vector_bytes(item, dim))
            if is_quantized(item):
                numbers: Numbers = from_blocks(item, np.frombuffer(data, np.uint8).reshape(n_rows, -1))
            else:
                numbers = np.frombuffer(data, _FLOATS[item])
            pair.append(numbers.reshape(count, facts.n_kv_heads, dim))
        skipped = min(max(least - first, 0), count)
        if skipped < count:
            arena.import_(layer, first + skipped, pair[0][skipped:], pair[1][skipped:])


def _head(file: _Checked) -> _Head:
    if file.read(len(MAGIC)) != MAGIC:
        raise DamagedCache(file.path, "it is no saved cache")
    (n_bytes,) = struct.unpack("<I", file.read(4))
    if n_bytes > _MOST_HEADER:
        raise DamagedCache(file.path, "its header is too long")
    try:
        header: dict[str, Any] = json.loads(file.read(n_bytes))
        if header["version"] != VERSION:
            raise DamagedCache(file.path, f"it is of version {header['version']}, and this edgelm reads {VERSION}")
        n, known = int(header["n"]), {str(item): item for item in ITEMS}
        keys, values = (known[item] for item in header["items"])
        layers = tuple(LayerCache(*map(int, layer)) for layer in header["layers"])
        firsts = tuple(map(int, header["firsts"]))
        dims = [(item, dim) for layer in layers for item, dim in zip((keys, values), layer[3:], strict=True)]
        uneven = any(is_quantized(item) and dim % BLOCK for item, dim in dims)
        if n < 0 or len(firsts) != len(layers) or uneven or not all(0 <= first <= n for first in firsts):
            raise DamagedCache(file.path, "its header makes no sense")
        identity = str(header["identity"])
    except (KeyError, TypeError, ValueError) as error:
        raise DamagedCache(file.path, "its header makes no sense") from error
    return _Head(identity, n, layers, firsts, (keys, values))
