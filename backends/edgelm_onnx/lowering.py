"""A piece of a segment as a graph of ONNX: which operators, and what each of its inputs and outputs is.

Values are [1, rows, width], as the operators for attention want them. Matrices that are packed are constants of the
graph, everything else is an input: weights as they lie in the file, tables of angles, caches and counts.
Knows no address and no memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from edgelm.engine.backend import PassShape
from edgelm.engine.ir import AttendSpec, Columns, NormSpec, Op, RopeSpec, Segment, Weight
from edgelm.errors import UnsupportedModel
from edgelm.files.ggml_types import TensorType
from edgelm_onnx import attention
from edgelm_onnx.attention import PassForm
from edgelm_onnx.kernels import Form
from edgelm_onnx.layout import Tile, stored_row_bytes, tiles
from edgelm_onnx.proto import BFLOAT16, FLOAT, FLOAT16, INT32, Attribute, Node, Port

ELEMENTS = {TensorType.F32: FLOAT, TensorType.F16: FLOAT16, TensorType.BF16: BFLOAT16}


class Source(NamedTuple):
    """What an input or output stands for. `kind` and `number` name a binding, `offset` is in bytes.

    | kind     | number               | what                                                     |
    |----------|----------------------|----------------------------------------------------------|
    | value    | value of the piece   | a matrix of the pass                                     |
    | weight   | weight of the piece  | a vector, or rows of a matrix as they are in the file    |
    | cache_keys, cache_values | layer of the piece | a cache                                 |
    | angles   | number of a table    | cosines, `offset` 1: sines                               |
    | places   | layer of the piece   | rows of the flat cache, see `attention.cache_rows`       |
    | mask, length | group                | what the pass says                                       |
    | last, total, out_rows |             | what the pass says                                       |
    """

    kind: str
    number: int = 0
    offset: int = 0


class Slot(NamedTuple):
    """An input or output by name, with its shape at a pass."""

    name: str
    source: Source
    element: int
    shape: tuple[int | str, ...]
    """Names of dimensions are those of `Sizes`."""


class Product(NamedTuple):
    """A packed matrix, or rows of it: from the byte `offset` of a weight on."""

    form: Form
    weight: int
    offset: int


@dataclass(slots=True)
class Lowered:
    """A graph, and what it needs."""

    nodes: list[Node] = field(default_factory=list)
    constants: dict[str, NDArray[np.generic]] = field(default_factory=dict)
    inputs: list[Slot] = field(default_factory=list)
    outputs: list[Slot] = field(default_factory=list)
    products: dict[str, Product] = field(default_factory=dict)
    tables: list[tuple[RopeSpec, int | None]] = field(default_factory=list)
    """Tables of angles: of which rotation, and which weight has the factors."""
    attends: list[AttendSpec] = field(default_factory=list)
    temporaries: dict[str, Callable[[PassShape], int]] = field(default_factory=dict)
    """Bytes of every value that the runtime allocates, by name; and, under the name of a node's output with a `!`
    behind it, of what its kernel needs while it runs."""

    def ports(self, slots: list[Slot]) -> list[Port]:
        return [Port(slot.name, slot.element, slot.shape) for slot in slots]


def lower(segment: Segment, form: PassForm) -> Lowered:
    """Raises `UnsupportedModel` for an operation that this backend lacks."""
    return _Lowering(segment, form).run()


def usual_form(segment: Segment, form: PassForm) -> PassForm:
    """Return the form whose lowering serves for this one, too: "chain" if they do not differ."""
    specs = [op.params for op in segment.ops if isinstance(op.params, AttendSpec)]
    differs = any(attention.is_fused(spec, form) != attention.is_fused(spec, "chain") for spec in specs)
    return form if differs else "chain"


class _Lowering:
    def __init__(self, segment: Segment, form: PassForm) -> None:
        self.segment, self.form, self.out = segment, form, Lowered()
        self.weight = 0
        self.names = {value: f"v{value}" for value in range(len(segment.values))}

    def run(self) -> Lowered:
        segment, out = self.segment, self.out
        for value in segment.inputs:
            out.inputs.append(self._value_slot(value))
        for op in segment.ops:
            method = getattr(self, f"_{op.kind}", None)
            if method is None:
                raise UnsupportedModel(f"the onnx backend has no operation {op.kind!r}; use a newer edgelm")
            method(op)
        for value in segment.outputs:
            out.outputs.append(self._value_slot(value))
            out.temporaries.pop(self.names[value], None)
        return out

    # --- building blocks

    def _value_slot(self, value: int) -> Slot:
        described = self.segment.values[value]
        rows = "tokens" if described.per == "token" else "rows"
        return Slot(self.names[value], Source("value", value), FLOAT, (1, rows, described.width))

    def node(
        self,
        op: str,
        inputs: tuple[str, ...],
        output: str,
        bytes_of: Callable[[PassShape], int],
        domain: str = "",
        **attributes: Attribute,
    ) -> str:
        """Add an operator with one output, and say how much memory that takes."""
        self.out.nodes.append(Node(op, inputs, (output,), attributes, domain))
        self.out.temporaries[output] = bytes_of
        return output

    def emit(self, op: Op, kind: str, inputs: tuple[str, ...], domain: str = "", **attributes: Attribute) -> str:
        """Add the operator that makes the output of `op`."""
        return self.node(kind, inputs, self.names[op.output], self.size(op.output), domain, **attributes)

    def size(self, value: int) -> Callable[[PassShape], int]:
        described = self.segment.values[value]
        return lambda shape: 4 * shape.rows(described.per) * described.width

    def constant(self, array: NDArray[np.generic]) -> str:
        for name, other in self.out.constants.items():
            if other.dtype == array.dtype and other.shape == array.shape and (other == array).all():
                return name
        name = f"c{len(self.out.constants)}"
        self.out.constants[name] = array
        return name

    def shape(self, *dims: int) -> str:
        return self.constant(np.array(dims, np.int64))

    def number(self, value: float) -> str:
        return self.constant(np.array(value, np.float32))

    def input(self, slot: Slot) -> str:
        """Declare an input, once."""
        if all(slot.name != other.name for other in self.out.inputs):
            self.out.inputs.append(slot)
        return slot.name

    def _next(self, op: Op) -> list[tuple[int, Weight]]:
        first, self.weight = self.weight, self.weight + len(op.weights)
        return list(enumerate(op.weights, first))

    def vector(self, index: int, weight: Weight) -> str:
        """Return a vector of the file as float32."""
        return self._widened(f"w{index}", index, 0, weight.type, (weight.width,))

    def _widened(self, name: str, index: int, offset: int, kind: TensorType, shape: tuple[int, ...]) -> str:
        if kind not in ELEMENTS:
            raise UnsupportedModel(f"the onnx backend cannot read {kind.name} weights here; use another quantization")
        self.input(Slot(name, Source("weight", index, offset), ELEMENTS[kind], shape))
        if kind is TensorType.F32:
            return name
        n_bytes = 4 * int(np.prod(shape))
        return self.node("Cast", (name,), f"{name}.f32", lambda _: n_bytes, to=FLOAT)

    # --- operations, by the names of edgelm.engine.ir.Op

    def _rms_norm(self, op: Op) -> None:
        spec, width = op.params, self.segment.values[op.output].width
        assert isinstance(spec, NormSpec)
        weights = self._next(op)
        each = width // spec.groups
        scale = self.vector(*weights[0]) if weights else self.constant(np.ones(each, np.float32))
        x, y = self.names[op.inputs[0]], self.names[op.output]
        size = self.size(op.output)
        if spec.groups == 1:
            self.emit(op, "SimplifiedLayerNormalization", (x, scale), axis=-1, epsilon=spec.eps)
            return
        # the views share the memory of what they look at
        apart = self.node("Reshape", (x, self.shape(1, -1, spec.groups, each)), f"{y}.apart", size)
        normed = self.node(
            "SimplifiedLayerNormalization", (apart, scale), f"{y}.normed", size, axis=-1, epsilon=spec.eps
        )
        self.emit(op, "Reshape", (normed, self.shape(1, -1, width)))

    def _linear(self, op: Op) -> None:
        (index, matrix), *bias = self._next(op)
        x, y = self.names[op.inputs[0]], self.names[op.output]
        product = f"{y}.product" if bias else y
        cut = tiles(matrix.type, matrix.width, matrix.rows)
        names = [product] if len(cut) == 1 else [f"{y}.t{tile.first_row}" for tile in cut]
        for name, tile in zip(names, cut, strict=True):
            self._tile(op, index, matrix, tile, x, name)
        if len(cut) > 1:
            self.node("Concat", tuple(names), product, self.size(op.output), axis=2)
        for number, vector in bias:
            self.emit(op, "Add", (product, self.vector(number, vector)))

    def _tile(self, op: Op, index: int, matrix: Weight, tile: Tile, x: str, y: str) -> None:
        rows_of, at = self._rows_of(op), tile.first_row * stored_row_bytes(matrix.type, matrix.width)
        name = f"w{index}.t{tile.first_row}"
        if tile.form is None:
            part = self._widened(name, index, at, matrix.type, (tile.rows, matrix.width))
            self.node(
                "FusedMatMul", (x, part), y, lambda shape: 4 * tile.rows * rows_of(shape), "com.microsoft", transB=1
            )
            return
        self.out.nodes.append(tile.form.node(name, x, y))
        self.out.temporaries[y] = lambda shape: 4 * tile.rows * rows_of(shape)
        # activations as bytes, with a scale and a sum for each block
        self.out.temporaries[f"{y}!"] = lambda shape: matrix.width * rows_of(shape) * 2
        self.out.products[name] = Product(tile.form, index, at)

    def _rows_of(self, op: Op) -> Callable[[PassShape], int]:
        per = self.segment.values[op.output].per
        return lambda shape: shape.rows(per)

    def _slice(self, op: Op) -> None:
        assert isinstance(op.params, Columns)
        start, width = op.params
        edges = (self.shape(start), self.shape(start + width), self.shape(2))
        self.emit(op, "Slice", (self.names[op.inputs[0]], *edges))

    def _add(self, op: Op) -> None:
        self.emit(op, "Add", self._inputs(op))

    def _mul(self, op: Op) -> None:
        self.emit(op, "Mul", self._inputs(op))

    def _inputs(self, op: Op) -> tuple[str, ...]:
        return tuple(self.names[value] for value in op.inputs)

    def _gate(self, op: Op) -> None:
        gate, up = self._inputs(op)
        active = f"{self.names[op.output]}.active"
        if op.params == "silu":
            self.node("QuickGelu", (gate,), active, self.size(op.output), "com.microsoft", alpha=1.0)
        else:
            self.node("Gelu", (gate,), active, self.size(op.output), approximate="tanh")
        self.emit(op, "Mul", (active, up))

    def _scale(self, op: Op) -> None:
        assert isinstance(op.params, float)
        self.emit(op, "Mul", (*self._inputs(op), self.number(op.params)))

    def _softcap(self, op: Op) -> None:
        assert isinstance(op.params, float)
        y = self.capped(self.names[op.inputs[0]], op.params, self.names[op.output], self.size(op.output))
        assert y == self.names[op.output]

    def capped(self, x: str, cap: float, y: str, size: Callable[[PassShape], int]) -> str:
        bounded = self.node("Mul", (x, self.number(1 / cap)), f"{y}.over", size)
        bounded = self.node("Tanh", (bounded,), f"{y}.tanh", size)
        return self.node("Mul", (bounded, self.number(cap)), y, size)

    def _select(self, op: Op) -> None:
        rows = self.input(Slot("out_rows", Source("out_rows"), INT32, ("rows",)))
        self.emit(op, "Gather", (*self._inputs(op), rows), axis=1)

    def _rope(self, op: Op) -> None:
        spec = op.params
        assert isinstance(spec, RopeSpec)
        weights = self._next(op)
        key = spec._replace(n_heads=1), weights[0][0] if weights else None
        if weights and weights[0][1].type is not TensorType.F32:
            raise UnsupportedModel(f"factors of rotary positions of type {weights[0][1].type.name} are not supported")
        same = [i for i, other in enumerate(self.out.tables) if self._same_angles(other, key)]
        if not same:
            self.out.tables.append(key)
        table = same[0] if same else len(self.out.tables) - 1
        half = spec.n_dims // 2
        cos, sin = (
            self.input(Slot(f"{name}{table}", Source("angles", table, part), FLOAT, ("tokens", half)))
            for part, name in enumerate(("cos", "sin"))
        )
        # position 0 and those after it: the table has the rows of this pass only
        self.emit(
            op,
            "RotaryEmbedding",
            (*self._inputs(op), self.shape(0), cos, sin),
            "com.microsoft",
            num_heads=spec.n_heads,
            rotary_embedding_dim=spec.n_dims,
            interleaved=int(not spec.neox),
        )

    @staticmethod
    def _same_angles(a: tuple[RopeSpec, int | None], b: tuple[RopeSpec, int | None]) -> bool:
        # two weights may be the same factors, but that is known only when they are bound
        return a[0]._replace(neox=True) == b[0]._replace(neox=True) and a[1] is None and b[1] is None

    def _attend(self, op: Op) -> None:
        assert isinstance(op.params, AttendSpec)
        self.out.attends.append(op.params)
        attention.lower(self, op, op.params)
