"""Cut a recorded model at the edges of its runs of weights.

A run may hold only some rows of a matrix: its product is then cut into products of those rows, put side by side where
a later operation needs the whole. Pure.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple

from edgelm.engine.ir import AttendSpec, Op, Placed, Trace, Value, Weight, place
from edgelm.memory.units import Part, Unit


class LogitTile(NamedTuple):
    """Logits `first` … `first + width - 1` are the value `value`."""

    value: int
    first: int
    width: int


class Cut(NamedTuple):
    """A pass: a segment for each run, or several where attention is computed apart. `runs`: the run of each segment.

    `tiles` make up the logits, `last_write` is the last run to write a cache.
    """

    segments: tuple[Placed, ...]
    tiles: tuple[LogitTile, ...]
    values: dict[int, Value]
    last_write: int
    runs: tuple[int, ...]


_ROWWISE = ("scale", "softcap")


def cut(trace: Trace, runs: Sequence[Unit], apart: Collection[int] = ()) -> Cut:
    """Return the segments of `trace` for the weights of `runs`, which are in pass order.

    The attention of the layers `apart` becomes segments of its own.
    """
    pieces: dict[str, list[tuple[int, Part]]] = {}
    for i, run in enumerate(runs):
        for part in run.parts:
            pieces.setdefault(part.tensor, []).append((i, part))
    values = dict(trace.values)
    ops: list[list[Op]] = [[] for _ in runs]
    tiled: dict[int, list[tuple[int, LogitTile]]] = {}
    current = 0
    for op in trace.ops:
        matrix = op.weights[0] if op.kind == "linear" else None
        homes = pieces.get(matrix.tensor, []) if matrix else []  # a matrix of one row is a constant
        tail = op.kind in _ROWWISE and op.inputs[0] in tiled and _leads_to_logits(trace, op)
        if tail:
            tiled[op.output] = []
            for i, tile in tiled.pop(op.inputs[0]):
                value = _new(values, tile.width, values[op.output])
                ops[i].append(op._replace(inputs=(tile.value,), output=value))
                tiled[op.output].append((i, LogitTile(value, tile.first, tile.width)))
            continue
        for value in op.inputs:
            if value in tiled:
                ops[current].append(Op("concat", tuple(tile.value for _, tile in tiled.pop(value)), value))
        if len(homes) <= 1:
            current = homes[0][0] if homes else current
            ops[current].append(op)
            continue
        tiled[op.output] = []
        for i, part in homes:
            value = _new(values, part.rows, values[op.output])
            weights = tuple(_rows(weight, part, whole=matrix) for weight in op.weights)
            ops[i].append(op._replace(output=value, weights=weights))
            tiled[op.output].append((i, LogitTile(value, part.first_row, part.rows)))
            current = i
    tiles = tuple(tile for _, tile in tiled.get(trace.logits, ()))
    tiles = tiles or (LogitTile(trace.logits, 0, values[trace.logits].width),)
    placed = [(i, piece) for i, group in enumerate(ops) for piece in _pieces(group, apart)]
    segments = _place([piece for _, piece in placed], values, frozenset(tile.value for tile in tiles))
    last_write = max((i for i, group in enumerate(ops) if any(op.kind == "attend" for op in group)), default=0)
    return Cut(segments, tiles, values, last_write, tuple(i for i, _ in placed))


def _pieces(ops: list[Op], apart: Collection[int]) -> Iterator[list[Op]]:
    """Yield the operations of a run, with the attention of the layers `apart` by itself."""
    piece: list[Op] = []
    for op in ops:
        if isinstance(op.params, AttendSpec) and op.params.layer in apart:
            yield piece
            yield [op]
            piece = []
        else:
            piece.append(op)
    yield piece


def _new(values: dict[int, Value], width: int, like: Value) -> int:
    values[len(values)] = Value(width, like.per)
    return len(values) - 1


def _rows(weight: Weight, part: Part, whole: Weight | None) -> Weight:
    if weight is whole:
        return weight._replace(first_row=part.first_row, rows=part.rows)
    # a bias is one row; its columns go with the rows of the matrix
    return weight._replace(first_row=part.first_row, width=part.rows)


def _leads_to_logits(trace: Trace, op: Op) -> bool:
    """Say whether `op` and all that follows work on logits row by row, so that tiles need not be joined."""
    position = trace.ops.index(op)
    return all(later.kind in _ROWWISE for later in trace.ops[position:])


def _place(ops: list[list[Op]], values: dict[int, Value], logits: frozenset[int]) -> tuple[Placed, ...]:
    last = {value: i for i, group in enumerate(ops) for op in group for value in op.inputs}
    end = len(ops)
    last.update(dict.fromkeys(logits, end))
    crossing = (frozenset(op.output for op in group if last.get(op.output, -1) > i) for i, group in enumerate(ops))
    return tuple(place(group, values, later) for group, later in zip(ops, crossing, strict=True))
