"""What the window moves: units of weights in pass order, cut so that each fits a slot.

A unit is a few whole matrices, or some rows of one. Small vectors (norms, biases) are not streamed: they make up the
constants, which are always resident. Knows shapes and places in files; reads nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from edgelm.files.gguf import TensorInfo
from edgelm.memory.buffer import PAGE
from edgelm.memory.stores import span


@dataclass(frozen=True, slots=True)
class Part:
    """Rows of one tensor: `n_bytes` at `offset` of file number `file`."""

    tensor: str
    first_row: int
    rows: int
    file: int
    offset: int
    n_bytes: int


@dataclass(frozen=True, slots=True)
class Read:
    """One request to a store: the bytes land in the unit's memory from `at` on, at `at + offset % 4096`."""

    file: int
    offset: int
    n_bytes: int
    at: int


@dataclass(frozen=True, slots=True)
class Unit:
    """Parts in pass order and the reads that fetch them. `span_bytes`: the memory they need, `n_bytes`: the payload."""

    parts: tuple[Part, ...]
    reads: tuple[Read, ...]
    n_bytes: int
    span_bytes: int

    def offset_of(self, part: Part) -> int:
        """Return where `part` begins in the unit's memory."""
        for read in self.reads:
            if read.file == part.file and read.offset <= part.offset < read.offset + read.n_bytes:
                return read.at + read.offset % PAGE + part.offset - read.offset
        raise KeyError(part.tensor)


def part_of(info: TensorInfo, first_row: int = 0, rows: int | None = None) -> Part:
    """Return some rows (all by default) of a tensor."""
    rows = info.n_rows - first_row if rows is None else rows
    offset = info.offset + first_row * info.row_bytes
    return Part(info.name, first_row, rows, info.file, offset, rows * info.row_bytes)


def make_unit(parts: Iterable[Part]) -> Unit:
    """Return the unit of these parts. Parts that touch in the file are fetched by one read."""
    parts = tuple(parts)
    runs: list[list[int]] = []
    for part in sorted(parts, key=lambda part: (part.file, part.offset)):
        if runs and runs[-1][0] == part.file and 0 <= part.offset - runs[-1][2] < PAGE:
            runs[-1][2] = part.offset + part.n_bytes
        else:
            runs.append([part.file, part.offset, part.offset + part.n_bytes])
    reads: list[Read] = []
    at = 0
    for file, start, stop in runs:
        reads.append(Read(file, start, stop - start, at))
        at += span(start, stop - start)
    return Unit(parts, tuple(reads), sum(part.n_bytes for part in parts), at)


def make_units(tensors: Sequence[TensorInfo], slot_bytes: int) -> tuple[Unit, ...]:
    """Cut matrices, given in pass order, into units whose span fits `slot_bytes`.

    Neighbours share a unit as long as they fit; a matrix larger than a slot is cut into rows of equal number.
    """
    units: list[Unit] = []
    waiting: list[Part] = []
    for info in tensors:
        for part in _pieces(info, slot_bytes):
            if waiting and make_unit([*waiting, part]).span_bytes > slot_bytes:
                units.append(make_unit(waiting))
                waiting = []
            waiting.append(part)
    if waiting:
        units.append(make_unit(waiting))
    return tuple(units)


def smallest_slot(tensors: Sequence[TensorInfo]) -> int:
    """Return the bytes of the smallest slot that every matrix can be cut for."""
    return max(span(PAGE - 1, min(info.row_step, info.n_rows) * info.row_bytes) for info in tensors)


def merge(units: Sequence[Unit]) -> Unit:
    """Return neighbouring units as one: rows of a matrix that were cut apart are whole again."""
    parts: list[Part] = []
    for part in (part for unit in units for part in unit.parts):
        last = parts[-1] if parts else None
        if last and last.tensor == part.tensor and last.first_row + last.rows == part.first_row:
            parts[-1] = Part(
                part.tensor, last.first_row, last.rows + part.rows, part.file, last.offset, last.n_bytes + part.n_bytes
            )
        else:
            parts.append(part)
    return make_unit(parts)


def constants(tensors: Mapping[str, TensorInfo], names: Iterable[str]) -> Unit:
    """Return the unit of all vectors among `names`: they are pinned whatever the budget."""
    return make_unit(part_of(tensors[name]) for name in names if tensors[name].n_rows == 1)


def _pieces(info: TensorInfo, slot_bytes: int) -> list[Part]:
    whole = part_of(info)
    if span(PAGE - 1, whole.n_bytes) <= slot_bytes:
        return [whole]
    fitting = (slot_bytes - 2 * PAGE) // info.row_bytes // info.row_step * info.row_step
    fitting = max(fitting, info.row_step)
    n_pieces = -(-info.n_rows // fitting)
    rows = -(-info.n_rows // n_pieces // info.row_step) * info.row_step
    return [part_of(info, first, min(rows, info.n_rows - first)) for first in range(0, info.n_rows, rows)]
