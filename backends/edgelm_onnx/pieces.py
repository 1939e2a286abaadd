"""Cut a segment into pieces that repeat: one session of ONNX Runtime computes all the layers of a kind.

A session packs every matrix that it has when it is made, into memory that is thrown away, so sessions are kept small:
a layer each where layers repeat, else a product, or some rows of a large matrix. Rows of a matrix that are not packed,
gathered rows and the joining of columns are left to NumPy.
Knows operations and how matrices are packed; no operator of ONNX and no address.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

from edgelm.engine.ir import Op, Placed, Segment, Value, Weight, place
from edgelm_onnx.layout import is_packed, stored_row_bytes, tile_rows, tiles, working_row_bytes

LARGEST_BYTES = 8 << 20
"""Bytes of a matrix that one piece computes with; a larger one is cut into groups of tiles."""
ON_HOST = frozenset({"embed", "concat", "left_over"})


class Ref(NamedTuple):
    """A weight of the segment by its number, from the byte `offset` on."""

    number: int
    offset: int


class Piece(NamedTuple):
    """Operations that run together. `weights` and `layers` say which of the segment's they are, `inputs` too.

    `repeats`: equal pieces make up most of the segment.
    """

    segment: Segment
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    weights: tuple[Ref, ...]
    layers: tuple[int, ...]
    repeats: bool

    @property
    def on_host(self) -> bool:
        return self.segment.ops[0].kind in ON_HOST


class Pieces(NamedTuple):
    """A segment, cut; `values` are those of the segment and those that the cuts have made."""

    pieces: tuple[Piece, ...]
    values: tuple[Value, ...]


def cut(segment: Segment) -> Pieces:
    values = list(segment.values)
    ops = [new for op in _named(segment) for new in _split(op, values)]
    known, outputs = dict(enumerate(values)), frozenset(segment.outputs)
    needed = [frozenset(live) for live in (*_live_before(ops, outputs)[1:], outputs)]  # after each operation

    def placed(span: range) -> Placed:
        return place(ops[span.start : span.stop], known, needed[span.stop - 1])

    large = [(span, placed(span)) for span in _spans(ops, outputs)]
    counts = Counter(part.segment for _, part in large)
    pieces: list[Piece] = []
    for span, part in large:
        if max(counts.values()) > 1:
            pieces.append(_piece(part, counts[part.segment] > 1))
        else:
            pieces += (_piece(placed(product), repeats=False) for product in _products(ops, span))
    return Pieces(tuple(pieces), tuple(values))


def _named(segment: Segment) -> Iterator[Op]:
    """Yield the operations with weights that are named by their number in the segment."""
    number = 0
    for op in segment.ops:
        weights = []
        for weight in op.weights:
            weights.append(weight._replace(tensor=str(number)))
            number += 1
        yield op._replace(weights=tuple(weights))


def _split(op: Op, values: list[Value]) -> Iterator[Op]:
    """Yield an operation, or a product in parts: groups of tiles, rows left over, and what joins them."""
    cuts = _row_cuts(op.weights[0]) if op.kind == "linear" else []
    if [kind for kind, _, _ in cuts] in ([], ["linear"]):
        yield op
        return
    parts = []
    for kind, first, rows in cuts:
        matrix, *bias = op.weights
        taken = matrix._replace(first_row=first, rows=rows)
        columns = (vector._replace(first_row=first, width=rows) for vector in bias)
        values.append(Value(rows, values[op.output].per))
        parts.append(len(values) - 1)
        yield op._replace(kind=kind, output=parts[-1], weights=(taken, *columns))
    yield Op("concat", tuple(parts), op.output)


def _row_cuts(matrix: Weight) -> list[tuple[str, int, int]]:
    """Return kind, first row and rows of the parts of a product."""
    step = tile_rows(matrix.type, matrix.width)
    group = max(LARGEST_BYTES // working_row_bytes(matrix.type, matrix.width) // step, 1) * step
    cut = tiles(matrix.type, matrix.width, matrix.rows)
    whole = sum(tile.rows for tile in cut if tile.form or not is_packed(matrix.type))
    cuts = [("linear", first, min(group, whole - first)) for first in range(0, whole, group)]
    return [*cuts, ("left_over", whole, matrix.rows - whole)] if whole < matrix.rows else cuts


def _spans(ops: Sequence[Op], outputs: frozenset[int]) -> list[range]:
    """Return pieces as large as a layer: between two `attend`, cut where only one value lives on."""
    edges = {0, len(ops)}
    for i, op in enumerate(ops):
        if op.kind in ON_HOST or _is_group(op):
            edges |= {i, i + 1}
    alone = [i for i, live in enumerate(_live_before(ops, outputs)) if len(live) == 1]
    for i, op in enumerate(ops):
        if op.kind == "attend":
            edges |= {max((at for at in alone if at <= i), default=0)}
    return _between(edges)


def _products(ops: Sequence[Op], span: range) -> list[range]:
    """Cut a piece of a segment without repetition around each product: those parts come again in other segments."""
    edges = {span.start, span.stop}
    for i in span:
        if ops[i].kind == "linear":
            edges |= {i, i + 1}
    return _between(edges)


def _between(edges: set[int]) -> list[range]:
    return [range(start, stop) for start, stop in pairwise(sorted(edges))]


def _is_group(op: Op) -> bool:
    if op.kind != "linear":
        return False
    matrix = op.weights[0]
    return 2 * matrix.rows * working_row_bytes(matrix.type, matrix.width) > LARGEST_BYTES


def _live_before(ops: Sequence[Op], outputs: frozenset[int]) -> list[set[int]]:
    """Return the values that each operation finds, and that it or a later one needs."""
    live = set(outputs)
    before: list[set[int]] = []
    for op in reversed(ops):
        live = (live - {op.output}) | set(op.inputs)
        before.append(set(live))
    return before[::-1]


def _piece(placed: Placed, repeats: bool) -> Piece:
    refs = [Ref(int(weight.tensor), _offset(weight, op, i)) for op, i, weight in _weights(placed)]
    return Piece(placed.segment, placed.inputs, placed.outputs, tuple(refs), placed.layers, repeats)


def _weights(placed: Placed) -> Iterator[tuple[Op, int, Weight]]:
    weights = iter(placed.weights)
    for op in placed.segment.ops:
        for i in range(len(op.weights)):
            yield op, i, next(weights)


def _offset(weight: Weight, op: Op, i: int) -> int:
    """Return where the rows begin (of a bias: the columns), in bytes."""
    if weight.first_row == 0:
        return 0
    if i > 0:
        return weight.first_row * weight.type.block_bytes
    return weight.first_row * stored_row_bytes(weight.type, weight.width)
