"""Find the matrix products of a session in memory, and let them compute on weights that lie elsewhere.

ONNX Runtime computes fast on 4- and 8-bit matrices only if it has packed them itself when the session was made, into
memory of its own. What the kernel object of a `MatMulNBits` node then holds is a pointer; here that pointer is found,
and set to where the window has the packed weights. The place of the pointer in the object is not assumed but searched,
once per process, with a session whose packed bytes are recognized; what is not found exactly once is refused.

A product is told from the others of its session by a mark: as a stand-in its codes are zero, but for a number of bytes
of all ones, whose count survives every permutation of bits.
Knows addresses and the attributes of the node; knows no types of ggml.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from edgelm.errors import BackendUnavailable
from edgelm_onnx import proto
from edgelm_onnx.memory import WORD, Bytes, Reader, Region, available, data_of, forget, heaps
from edgelm_onnx.runtime import MODULE, NAME, Graph

Floats = NDArray[np.float32]

ALIGNMENT = 64
_MARKS = 1024
"""Products that one session may have."""
_MARKED_ROWS = 64
_REACH = 40
"""Words around the first number of an object among which its pointer and its class are looked for."""
_HINT = "use another version of onnxruntime, or another backend"


class Form(NamedTuple):
    """The attributes of a product: `rows` outputs of `width` inputs, codes of `bits` bits in blocks of `block`."""

    rows: int
    width: int
    bits: int
    block: int

    @property
    def n_blocks(self) -> int:
        """Blocks of a row."""
        return self.width // self.block

    @property
    def n_scales(self) -> int:
        return self.rows * self.n_blocks

    @property
    def code_bytes(self) -> int:
        return self.rows * self.width * self.bits // 8

    def node(self, name: str, x: str, y: str) -> proto.Node:
        """Return the operator; `name` names its codes."""
        attributes = {"K": self.width, "N": self.rows, "bits": self.bits, "block_size": self.block, "accuracy_level": 4}
        codes, scales = (stand.name for stand in constants(name, self))
        return proto.Node("MatMulNBits", (x, codes, scales), (y,), attributes, "com.microsoft")


class Kernel(NamedTuple):
    """A product found in memory: where its pointer lies, what the pointer is, and to how many bytes."""

    pointer: int
    packed: int
    n_bytes: int


class _Layout(NamedTuple):
    """Where things lie in a kernel object: its class, and distances from the number `width`, in words."""

    table: int
    back: int
    pointer: int


class Pointers:
    """The weights of a session's products, set before each run. Undone when this, or the process, ends."""

    def __init__(self, graph: Graph, kernels: Sequence[Kernel]) -> None:
        self._words = [ctypes.c_uint64.from_address(kernel.pointer) for kernel in kernels]
        for kernel in kernels:
            forget(kernel.packed, kernel.n_bytes)
        originals = [kernel.packed for kernel in kernels]
        # the session frees what its kernels point to: by then that must be their own memory again
        self._undo = weakref.finalize(self, _restore, self._words, originals, graph)

    def set(self, addresses: Iterable[int]) -> None:
        for word, address in zip(self._words, addresses, strict=True):
            word.value = address


def _restore(words: Sequence[ctypes.c_uint64], originals: Sequence[int], graph: Graph) -> None:
    for word, original in zip(words, originals, strict=True):
        word.value = original
    del graph  # it lives as long as the pointers do


def marked(forms: Mapping[str, Form]) -> tuple[list[proto.Stand], dict[str, NDArray[np.generic]]]:
    """Return stand-ins for the constants of these products, and what to give the session for them."""
    stands: dict[str, proto.Stand] = {}
    arrays: dict[str, NDArray[np.generic]] = {}
    zone = _zone(max((form.code_bytes + 4 * form.n_scales for form in forms.values()), default=0))
    for mark, (name, form) in enumerate(forms.items()):
        codes, scales = constants(name, form)
        stop = len(zone) - _MARKS + mark + 1
        arrays[codes.name] = zone[stop - form.code_bytes : stop].reshape(codes.shape)
        arrays[scales.name] = zone[: 4 * form.n_scales].view(np.float32)
        stands |= {codes.name: codes, scales.name: scales}
    return list(stands.values()), arrays


def constants(name: str, form: Form) -> tuple[proto.Stand, proto.Stand]:
    """Return the codes and the scales of a product, as a model declares them. Products of a size share their scales."""
    shape = (form.rows, form.n_blocks, form.block * form.bits // 8)
    return (
        proto.Stand(f"{name}.codes", proto.UINT8, shape, form.code_bytes),
        proto.Stand(f"scales{form.n_scales}", proto.FLOAT, (form.n_scales,), 4 * form.n_scales),
    )


_zones: list[Bytes] = []


def _zone(n_bytes: int) -> Bytes:
    """Zeros that are never written, so that they take no memory, and the marks behind them."""
    if not _zones or len(_zones[-1]) < n_bytes + _MARKS:
        zone = np.zeros(max(n_bytes, 1 << 22) + _MARKS, np.uint8)
        zone[-_MARKS:] = 0xFF
        _zones[:] = [zone]
    return _zones[-1]


def find_marked(forms: Sequence[Form]) -> list[Kernel]:
    """Return the kernels of the products that `marked` was just made for, in order. Raises `BackendUnavailable`."""
    found: dict[int, set[Kernel]] = {}
    with Reader() as reader:
        for region in _likely(heaps()):
            for kernel, form in _kernels(reader, region, set(forms)):
                mark = _mark(reader, form, kernel.packed)
                if mark is not None and mark < len(forms) and forms[mark] == form:
                    found.setdefault(mark, set()).add(kernel)
            if len(found) == len(forms):
                break
    if len(found) != len(forms) or any(len(kernels) != 1 for kernels in found.values()):
        raise BackendUnavailable(NAME, "not every matrix product of a session was found in memory once", _HINT)
    return [found[mark].pop() for mark in range(len(forms))]


def read_packed(form: Form, scales: Floats) -> Bytes:
    """Return a copy of the packed bytes of the one session whose product has this form and these scales.

    The scales end the packed bytes, in another order, which their sum as integers does not depend on.
    """
    wanted = int(scales.view(np.uint32).sum(dtype=np.uint64))
    with Reader() as reader:
        for kernel, _ in (each for region in _likely(heaps()) for each in _kernels(reader, region, {form})):
            raw = reader.read(-(-kernel.packed // ALIGNMENT) * ALIGNMENT, kernel.n_bytes - 2 * ALIGNMENT + 2)
            if raw is None:
                continue
            if int(raw[-scales.nbytes :].view(np.uint32).sum(dtype=np.uint64)) == wanted:
                return raw
    raise BackendUnavailable(NAME, "the packed bytes of a matrix were not found in memory", _HINT)


_last_seen: list[int] = []
"""Where the last kernel was found: the next one is not far, as a rule."""
_NEAR = 1 << 20


def _likely(regions: Sequence[Region]) -> Iterator[Region]:
    """Yield the surroundings of the last find before the regions themselves."""
    for address in _last_seen:
        for region in regions:
            if region.start <= address < region.stop:
                start = max(region.start, (address - _NEAR) // WORD * WORD)
                yield Region(start, min(region.stop, start + 2 * _NEAR), region.path)
    yield from regions


def _kernels(reader: Reader, region: Region, forms: set[Form]) -> Iterator[tuple[Kernel, Form]]:
    layout = _object_layout()
    for address in reader.find(layout.table, region):
        numbers = reader.words(address, layout.back + _REACH)[layout.back :]
        if not numbers:
            continue
        packed, n_bytes = numbers[layout.pointer], numbers[layout.pointer + 1]
        for form in forms:
            if numbers[:3] != [form.width, form.rows, form.block] or form.bits not in numbers[3:8]:
                continue
            if form.code_bytes <= n_bytes <= 4 * form.code_bytes + 4096:
                _last_seen[:] = [address]
                yield Kernel(address + (layout.back + layout.pointer) * WORD, packed, n_bytes), form


@cache
def _object_layout() -> _Layout:
    """Find where kernel objects keep their pointer. Raises `BackendUnavailable` if that is not plain."""
    if not available():
        raise BackendUnavailable(NAME, "it needs to read the process's own memory, which this system does not allow")
    form = Form(48, 3104, 4, 32)  # a number that memory holds seldom
    graph = products([form] * 3)
    seen: dict[_Layout, set[int]] = {}
    tables = data_of(MODULE)
    with Reader() as reader:
        for region in heaps():
            for address in reader.find(form.width, region):
                for layout, mark in _guesses(reader, form, address, tables):
                    seen.setdefault(layout, set()).add(mark)
            if {0, 1, 2} in seen.values():
                break
    del graph
    whole = [layout for layout, marks in seen.items() if marks == {0, 1, 2}]
    if len(whole) != 1:
        raise BackendUnavailable(NAME, f"its packed weights were found {len(whole)} times instead of once", _HINT)
    return whole[0]


def _guesses(reader: Reader, form: Form, address: int, tables: Sequence[Region]) -> Iterator[tuple[_Layout, int]]:
    """Yield what an object would look like whose first number, the width, is at `address`, and the mark found there."""
    words = reader.words(address - _REACH * WORD, 2 * _REACH)
    before, after = words[:_REACH], words[_REACH:]
    if not after or after[1] != form.rows:
        return
    back = next((i for i in range(1, 8) if any(r.start <= before[-i] < r.stop for r in tables)), None)
    if back is None:
        return
    for at in range(2, _REACH - 1):
        mark = _mark(reader, form, after[at])
        if mark is not None:
            yield _Layout(before[-back], back, at), mark


def products(forms: Sequence[Form], arrays: Mapping[str, NDArray[np.generic]] | None = None) -> Graph:
    """Return a session of nothing but products: `m0` from `m0.x` to `m0.y`, and so on, marked if without `arrays`."""
    named = {f"m{i}": form for i, form in enumerate(forms)}
    stands, marks = marked(named)
    nodes = [form.node(name, f"{name}.x", f"{name}.y") for name, form in named.items()]
    inputs = [proto.Port(f"{name}.x", proto.FLOAT, (1, "n", form.width)) for name, form in named.items()]
    outputs = [proto.Port(f"{name}.y", proto.FLOAT, (1, "n", form.rows)) for name, form in named.items()]
    return Graph(proto.model(nodes, inputs, outputs, {}, stands), marks if arrays is None else arrays)


def _mark(reader: Reader, form: Form, packed: int) -> int | None:
    """Return the mark of the packed bytes at this address; None if there are none.

    Marked codes are the last of their matrix, and packing moves none further than a group of rows.
    """
    n_bytes = min(_MARKED_ROWS * form.code_bytes // form.rows, form.code_bytes)
    start = -(-packed // ALIGNMENT) * ALIGNMENT + form.code_bytes - n_bytes
    codes = reader.read(start, n_bytes) if packed % 16 == 0 and packed else None
    if codes is None:
        return None
    base = np.bincount(codes[::7]).argmax().astype(np.uint8)
    others = codes[codes != base]
    if len(others) == 0 or len(others) > 8 * _MARKS:
        return None
    n_bits = int(np.unpackbits(others ^ base).sum())
    return n_bits // 8 - 1 if n_bits % 8 == 0 else None
