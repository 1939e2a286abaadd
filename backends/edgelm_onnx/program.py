"""Programs: the pieces of a segment, bound to addresses and run one after the other.

Before each run the products of a piece are pointed to where the bindings say that the weights lie. Everything else is
bound by address, once for each set of addresses.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import accumulate
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from edgelm.engine.backend import Bindings, PassShape
from edgelm.engine.ir import RopeSpec, Segment
from edgelm.engine.rope import angles
from edgelm_onnx import proto
from edgelm_onnx.attention import cache_rows, is_fused, pass_form
from edgelm_onnx.host import HostStep, array, host_step
from edgelm_onnx.kernels import Pointers, find_marked, marked
from edgelm_onnx.lowering import Lowered, Slot
from edgelm_onnx.pieces import Piece, Pieces
from edgelm_onnx.runtime import Binding, Graph
from edgelm_onnx.scratch import places

if TYPE_CHECKING:
    from edgelm_onnx.session import OnnxSession

_ELEMENTS: dict[int, Any] = {
    proto.FLOAT: np.float32,
    proto.FLOAT16: np.float16,
    proto.INT32: np.int32,
    proto.INT64: np.int64,
    proto.BFLOAT16: proto.BFLOAT16,
}


class Angles:
    """Cosines and sines of the positions of a pass, float32 [n_tokens, n_dims / 2]."""

    def __init__(self, spec: RopeSpec, factors: int | None, n_tokens: int) -> None:
        self._spec, self._factors = spec, factors
        self.parts = [np.zeros((n_tokens, spec.n_dims // 2), np.float32) for _ in range(2)]
        self._positions = b""

    def move_to(self, positions: NDArray[np.int32]) -> None:
        now = positions.tobytes()
        if now == self._positions:
            return
        half = (self._spec.n_dims // 2,)
        factors = None if self._factors is None else array(self._factors, half, np.float32)
        for part, fresh in zip(self.parts, angles(self._spec, positions, factors), strict=True):
            part[...] = fresh
        self._positions = now


class SharedGraph:
    """The graph of a piece. Its packed stand-ins are given back at once."""

    def __init__(self, low: Lowered) -> None:
        self.lowered = low
        forms = {name: product.form for name, product in low.products.items()}
        stands, arrays = marked(forms)
        model = proto.model(low.nodes, low.ports(low.inputs), low.ports(low.outputs), low.constants, stands)
        self.graph = Graph(model, arrays)
        self.pointers = Pointers(self.graph, find_marked(list(forms.values())) if forms else [])
        self.binding = self.graph.binding()
        """For all who bind it anew before each run: a binding takes 10 KB."""


class _Step(NamedTuple):
    """A piece, and what runs it: a graph, or NumPy. Pieces that repeat keep a binding of their own."""

    piece: Piece
    graph: SharedGraph | None
    binding: Binding | None
    host: HostStep | None


class _Bound(NamedTuple):
    """The addresses of a step: inputs and output for NumPy, or what the shared binding of a graph is to be given."""

    inputs: tuple[int, ...]
    output: int
    slots: tuple[tuple[bool, str, Any, tuple[int, ...], int], ...]


class OnnxProgram:
    """A compiled segment."""

    def __init__(self, session: OnnxSession, pieces: Pieces, segment: Segment, shape: PassShape) -> None:
        self._session, self._pieces, self._segment, self._shape = session, pieces, segment, shape
        self._places = places(pieces, segment, shape)
        self._steps = [self._step(piece) for piece in pieces.pieces]
        self._bound: Bindings | None = None
        self._key: tuple[object, ...] = (None,)
        self._values: list[_Bound] = []
        self._weights: list[tuple[int, ...]] = []
        self._tables: dict[int, Angles] = {}
        self._counts = np.zeros(2, np.int32)
        self._lengths = np.array([group.length for group in shape.groups], np.int64)
        self._cells: dict[tuple[int, int], NDArray[np.int64]] = {}
        self._moving = self._moving_weights()
        specs = [spec for step in self._steps if step.graph for spec in step.graph.lowered.attends]
        self._fused_groups = {spec.group for spec in specs if is_fused(spec, pass_form(shape))}

    def run(self, bindings: Bindings) -> None:
        session = self._session
        scratch = session.scratch(self._places.n_bytes)
        if bindings is not self._bound or scratch != self._key[0]:
            self._bind(bindings, scratch)
        self._prepare(bindings)
        with session.running() as run:
            for step, weights, bound in zip(self._steps, self._weights, self._values, strict=True):
                if step.host is not None:
                    session.check()
                    step.host(weights, bound.inputs, bound.output)
                    continue
                graph, binding = step.graph, step.binding
                assert graph is not None
                graph.pointers.set(weights)
                if binding is None:
                    binding = graph.binding
                    binding.take(bound.slots)
                run(graph.graph, binding)

    def _prepare(self, bindings: Bindings) -> None:
        """Bring what depends on the positions of the pass up to date."""
        n = self._shape.n_tokens
        positions = array(bindings.positions, (n,), np.int32)
        last = int(positions[0]) + n - 1  # positions of a pass follow each other
        self._counts[:] = last, last + 1
        for table in self._tables.values():
            table.move_to(positions)
        for group in self._fused_groups:
            stored = array(bindings.places[group], (n,), np.int64)
            assert stored[0] == positions[0], "fused attention needs every position at its own place"
        for (group, n_heads), cells in self._cells.items():
            stored = array(bindings.places[group], (n,), np.int64)
            cells[...] = cache_rows(n_heads, self._shape.groups[group].capacity, stored)

    # --- binding

    def _step(self, piece: Piece) -> _Step:
        if piece.on_host:
            return _Step(piece, None, None, host_step(piece.segment, self._shape))
        graph = self._session.graph(piece.segment, pass_form(self._shape))
        return _Step(piece, graph, graph.graph.binding() if piece.repeats else None, None)

    def _moving_weights(self) -> frozenset[int]:
        """Return the weights of the segment that need no new binding when they lie elsewhere."""
        moving: set[int] = set()
        for step in self._steps:
            refs = step.piece.weights
            if step.graph is None:
                moving.update(ref.number for ref in refs)
            else:
                moving.update(refs[product.weight].number for product in step.graph.lowered.products.values())
        return frozenset(moving)

    def _bind(self, bindings: Bindings, scratch: int) -> None:
        """Take over new addresses. A program that runs for many layers in turn is bound anew each time."""
        fixed = tuple(at for i, at in enumerate(bindings.weights) if i not in self._moving)
        key = (
            scratch, fixed, bindings.inputs, bindings.outputs, bindings.keys, bindings.values, bindings.masks,
            bindings.out_rows,
        )  # fmt: skip
        if key != self._key:
            self._key = (None,)  # half of the steps may be bound if one of them fails
            self._tables.clear()
            self._values = [*self._bind_values(bindings, scratch)]
            self._key = key
        self._bound = bindings
        self._weights = [self._addresses(step, bindings) for step in self._steps]

    def _addresses(self, step: _Step, bindings: Bindings) -> tuple[int, ...]:
        """Return where the weights of a step lie that are not part of its binding."""
        refs = step.piece.weights
        if step.graph is None:
            return tuple(bindings.weights[ref.number] + ref.offset for ref in refs)
        return tuple(
            bindings.weights[refs[product.weight].number] + refs[product.weight].offset + product.offset
            for product in step.graph.lowered.products.values()
        )

    def _bind_values(self, bindings: Bindings, scratch: int) -> Iterator[_Bound]:
        """Find the addresses of every step."""
        segment = self._segment
        at = {value: scratch + offset for value, offset in self._places.offsets.items()}
        at |= dict(zip(segment.inputs, bindings.inputs, strict=True))
        at |= dict(zip(segment.outputs, bindings.outputs, strict=True))
        at |= self._in_place(at)
        for piece, graph, binding, _ in self._steps:
            inputs = tuple(at[value] for value in piece.inputs)
            outputs = tuple(at[value] for value in piece.outputs)
            if graph is None:
                yield _Bound(inputs, outputs[0], ())
                continue
            values = dict(zip((*piece.segment.inputs, *piece.segment.outputs), (*inputs, *outputs), strict=True))
            find = _Finder(self, bindings, piece, graph, values)
            low = graph.lowered
            slots = tuple(
                (slots is low.inputs, slot.name, _ELEMENTS[slot.element], find.shape(slot), find.address(slot))
                for slots in (low.inputs, low.outputs)
                for slot in slots
            )
            if binding is None:
                yield _Bound((), 0, slots)
            else:
                binding.take(slots)
                yield _Bound((), 0, ())

    def _in_place(self, at: Mapping[int, int]) -> dict[int, int]:
        """Return where parts of a cut product go that make up a single row of an output: right into it.

        A value in scratch memory has its place only from the joining on, so there parts must wait.
        """
        placed: dict[int, int] = {}
        n_given, values = len(self._segment.values), self._pieces.values
        for piece in self._pieces.pieces:
            if piece.segment.ops[0].kind != "concat" or piece.outputs[0] not in self._segment.outputs:
                continue
            is_row = self._shape.rows(values[piece.outputs[0]].per) == 1
            if is_row and all(value >= n_given for value in piece.inputs):
                starts = accumulate((4 * values[value].width for value in piece.inputs), initial=at[piece.outputs[0]])
                placed |= dict(zip(piece.inputs, starts, strict=False))
        return placed

    def table(self, spec: RopeSpec, factors: int | None) -> Angles:
        table = self._session.angles(spec, factors, self._shape.n_tokens)
        self._tables[id(table)] = table
        return table

    def cells(self, group: int, n_heads: int) -> NDArray[np.int64]:
        if (group, n_heads) not in self._cells:
            self._cells[group, n_heads] = np.zeros((n_heads * self._shape.n_tokens, 1), np.int64)
        return self._cells[group, n_heads]

    @property
    def shape(self) -> PassShape:
        return self._shape

    @property
    def counts(self) -> NDArray[np.int32]:
        """The last position of the pass, and how many are stored with it."""
        return self._counts

    @property
    def lengths(self) -> NDArray[np.int64]:
        return self._lengths


class _Finder:
    """Says where an input or output of a graph lies, and what shape it has in this pass."""

    def __init__(
        self, program: OnnxProgram, bindings: Bindings, piece: Piece, graph: SharedGraph, values: dict[int, int]
    ) -> None:
        self._program, self._bindings, self._piece, self._graph, self._values = program, bindings, piece, graph, values
        self._by_layer = {spec.layer: spec for spec in graph.lowered.attends}

    def address(self, slot: Slot) -> int:
        return int(getattr(self, f"_{slot.source.kind}")(slot))

    def shape(self, slot: Slot) -> tuple[int, ...]:
        return tuple(dim if isinstance(dim, int) else self._dim(dim) for dim in slot.shape)

    def _dim(self, name: str) -> int:
        shape = self._program.shape
        if name == "tokens":
            return shape.n_tokens
        if name == "rows":
            return shape.n_outputs
        what, number = name.rstrip("0123456789"), int(name.lstrip("abcdefghijklmnopqrstuvwxyz"))
        if what == "capacity":
            return shape.groups[number].capacity
        if what == "length":
            return shape.groups[number].length
        spec = self._by_layer[number]
        return spec.n_kv_heads * (shape.n_tokens if what == "places" else shape.groups[spec.group].capacity)

    def _value(self, slot: Slot) -> int:
        return self._values[slot.source.number]

    def _weight(self, slot: Slot) -> int:
        ref = self._piece.weights[slot.source.number]
        return self._bindings.weights[ref.number] + ref.offset + slot.source.offset

    def _cache_keys(self, slot: Slot) -> int:
        return self._bindings.keys[self._piece.layers[slot.source.number]]

    def _cache_values(self, slot: Slot) -> int:
        return self._bindings.values[self._piece.layers[slot.source.number]]

    def _angles(self, slot: Slot) -> int:
        spec, weight = self._graph.lowered.tables[slot.source.number]
        factors = None if weight is None else self._bindings.weights[self._piece.weights[weight].number]
        return int(self._program.table(spec, factors).parts[slot.source.offset].ctypes.data)

    def _places(self, slot: Slot) -> int:
        spec = self._by_layer[slot.source.number]
        return int(self._program.cells(spec.group, spec.n_kv_heads).ctypes.data)

    def _mask(self, slot: Slot) -> int:
        return self._bindings.masks[slot.source.number]

    def _length(self, slot: Slot) -> int:
        return int(self._program.lengths[slot.source.number :].ctypes.data)

    def _last(self, slot: Slot) -> int:
        return int(self._program.counts.ctypes.data)

    def _total(self, slot: Slot) -> int:
        return int(self._program.counts[1:].ctypes.data)

    def _out_rows(self, slot: Slot) -> int:
        return self._bindings.out_rows
