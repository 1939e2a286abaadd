"""Backends for tests: NumPy's programs behind layouts of weights and caches that NumPy does not know.

`shuffled` holds matrices in an invertible layout of its own, `cached` wants other caches, `adopting` copies what stays.
Each undoes its layout before NumPy computes, so every logit must have NumPy's bits.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgelm.engine.backend import (
    Availability,
    Bindings,
    CacheLayout,
    Capabilities,
    Packed,
    PassShape,
    Program,
    Session,
)
from edgelm.engine.ir import AttendSpec, Segment, Weight
from edgelm.engine.registry import get_backend
from edgelm.files.ggml_types import TensorType, row_bytes
from edgelm.files.model import TensorInfo
from edgelm.memory.buffer import align_up
from edgelm.memory.cache_layout import USUAL

STEP = 32
PLAIN = frozenset({TensorType.F16})
"""A type that the layout leaves as it is in the file."""


def raw(address: int, n_bytes: int) -> NDArray[np.uint8]:
    return np.frombuffer(memoryview((ctypes.c_ubyte * n_bytes).from_address(address)), np.uint8)


class Shuffled:
    """Rows of a tile last first, their bytes mirrored and inverted, and padding after each: `pages` whole pages."""

    def __init__(self, key: str = "shuffled 1", pages: bool = True) -> None:
        self.key, self._pages = key, pages

    def packed(self, info: TensorInfo) -> Packed | None:
        if info.type in PLAIN:
            return None
        return Packed(self.row_bytes(info.type, info.shape[0]), STEP)

    def row_bytes(self, kind: TensorType, width: int) -> int:
        n_bytes = row_bytes(kind, width) + 5
        return align_up(n_bytes, 128) if self._pages else n_bytes  # 32 rows of 128 bytes are a page

    def pack(self, info: TensorInfo, first_row: int, rows: memoryview, out: memoryview) -> None:
        given = np.frombuffer(rows, np.uint8).reshape(-1, row_bytes(info.type, info.shape[0]))
        assert first_row % STEP == 0
        made = np.frombuffer(out, np.uint8).reshape(len(given), -1)
        assert not made.any(), "the room is empty"
        made[:, : given.shape[1]] = ~given[::-1, ::-1]

    def unpack(self, weight: Weight, address: int) -> NDArray[np.uint8]:
        """Return the rows of a run of whole tiles, as in the file."""
        packed, row = self.row_bytes(weight.type, weight.width), row_bytes(weight.type, weight.width)
        if self._pages:
            assert address % 4096 == 0, "tiles begin at pages"
        tiles = raw(address, weight.rows * packed).reshape(weight.rows, packed)
        out = np.empty((weight.rows, row), np.uint8)
        for first in range(0, weight.rows, STEP):
            out[first : first + STEP] = ~tiles[first : first + STEP, :row][::-1, ::-1]
        return out


class _Program:
    def __init__(self, session: LayoutSession, inner: Program, segment: Segment, shape: PassShape) -> None:
        self._session, self._inner, self._segment, self._shape = session, inner, segment, shape

    def run(self, bindings: Bindings) -> None:
        alive: list[Any] = []
        addresses = []
        for weight, address, matrix in zip(
            self._segment.weights, bindings.weights, matrices(self._segment), strict=True
        ):
            if address < 0:
                address = self._session.copies[address].ctypes.data
            if matrix and self._session.layout is not None and weight.type not in PLAIN:
                alive.append(self._session.layout.unpack(weight, address))
                address = alive[-1].ctypes.data
            addresses.append(address)
        bindings = bindings._replace(weights=tuple(addresses))
        if self._session.cache == USUAL:
            self._inner.run(bindings)
        else:
            self._run_on_copies(bindings)

    def _run_on_copies(self, bindings: Bindings) -> None:
        """Compute on caches as NumPy wants them, and bring back what was written."""
        dtype, pairs = self._session.cache.dtype, []
        specs = {op.params.layer: op.params for op in self._segment.ops if isinstance(op.params, AttendSpec)}
        keys, values = [], []
        for layer in range(self._segment.n_layers):
            spec = specs[layer]
            places = self._shape.groups[spec.group].capacity
            own_keys = raw_array(bindings.keys[layer], (spec.n_kv_heads, places, spec.head_dim_k), dtype)
            shape = (spec.n_kv_heads, places, spec.head_dim_v)
            if self._session.cache.values == "dim_place":
                own_values = raw_array(bindings.values[layer], (shape[0], shape[2], shape[1]), dtype)
            else:
                own_values = raw_array(bindings.values[layer], shape, dtype).transpose(0, 2, 1)
            for own, list_ in ((own_keys, keys), (own_values, values)):
                list_.append(np.ascontiguousarray(own, np.float16))
                pairs.append((own, list_[-1]))
        self._inner.run(
            bindings._replace(
                keys=tuple(array.ctypes.data for array in keys),
                values=tuple(array.ctypes.data for array in values),
            )
        )
        for own, used in pairs:
            own[...] = used


def raw_array(address: int, shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
    return raw(address, int(np.prod(shape)) * np.dtype(dtype).itemsize).view(dtype).reshape(shape)


def matrices(segment: Segment) -> list[bool]:
    """Say of each weight of a segment whether it is a matrix."""
    return [op.kind == "linear" and i == 0 for op in segment.ops for i in range(len(op.weights))]


class LayoutSession:
    def __init__(self, inner: Session, layout: Shuffled | None, cache: CacheLayout) -> None:
        self._inner, self.layout, self.cache = inner, layout, cache
        self.copies: dict[int, NDArray[np.uint8]] = {}

    def compile(self, segment: Segment, shape: PassShape) -> Program:
        inner = self._inner.compile(segment, shape._replace(cache=USUAL))  # it computes on copies
        return _Program(self, inner, segment, shape)

    def scratch_bytes(self, segment: Segment, shape: PassShape) -> int:
        # without what undoing layouts takes: a backend that computes on them does not
        return self._inner.scratch_bytes(segment, shape._replace(cache=USUAL))

    def reserve(self, scratch_bytes: int) -> None:
        self._inner.reserve(scratch_bytes)

    def use_threads(self, n_threads: int) -> None:
        self._inner.use_threads(n_threads)

    def abort(self, on: bool) -> None:
        self._inner.abort(on)

    def close(self) -> None:
        self._inner.close()


class AdoptingSession(LayoutSession):
    """Also counts: `copied_bytes` are held now, `n_adopted` were ever copied."""

    copied_bytes = n_adopted = 0

    def adopt(self, weight: Weight, address: int, matrix: bool) -> int:
        packed = matrix and self.layout is not None and weight.type not in PLAIN
        row = self.layout.row_bytes if packed and self.layout else row_bytes
        n_bytes = weight.rows * row(weight.type, weight.width)
        room = np.empty(n_bytes + 4096, np.uint8)
        start = -room.ctypes.data % 4096
        copy = room[start : start + n_bytes]
        copy[:] = raw(address, n_bytes)
        self.n_adopted += 1
        self.copied_bytes += n_bytes
        self.copies[-self.n_adopted] = copy
        return -self.n_adopted

    def drop(self, handle: int) -> None:
        self.copied_bytes -= len(self.copies.pop(handle))


class LayoutBackend:
    def __init__(
        self,
        name: str,
        layout: Shuffled | None = None,
        cache: CacheLayout = USUAL,
        adopts: bool = False,
        streams: bool = True,
    ) -> None:
        self.name, self._layout, self._cache, self._adopts, self._streams = name, layout, cache, adopts, streams

    def probe(self) -> Availability:
        return Availability(True, version="1")

    def capabilities(self) -> Capabilities:
        return Capabilities(get_backend("numpy").capabilities().types, self._streams, self._cache)

    def layout(self) -> Shuffled | None:
        return self._layout

    def open(self, n_threads: int) -> LayoutSession:
        kind = AdoptingSession if self._adopts else LayoutSession
        return kind(get_backend("numpy").open(n_threads), self._layout, self._cache)


SHUFFLED = LayoutBackend("shuffled", Shuffled())
CACHED = LayoutBackend("cached", cache=CacheLayout("f32", "place_dim", rings=False))
ADOPTING = LayoutBackend("adopting", Shuffled("shuffled 2", pages=False), adopts=True)
WHOLE = LayoutBackend("whole", Shuffled("shuffled 2", pages=False), adopts=True, streams=False)
NAMES = {
    one.name: f"layout_backends:{attribute}"
    for attribute, one in (("SHUFFLED", SHUFFLED), ("CACHED", CACHED), ("ADOPTING", ADOPTING), ("WHOLE", WHOLE))
}
