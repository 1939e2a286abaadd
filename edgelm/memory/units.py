"""What the window moves: units of weights in pass order, cut so that each fits a slot.

A unit is a few whole matrices, or some rows of one. Small vectors (norms, biases) are not streamed: they make up the
constants, which are always resident. Knows shapes and places in files; reads nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

from edgelm.files.model import TensorInfo
from edgelm.memory.buffer import PAGE, align_up
from edgelm.memory.stores import span

MAX_UNITS = 1024
"""About as many units as the matrices of a model are cut into at the most. What the process keeps of one (the plan, a
step of the pass, a place in the cut) takes 2 KB and more: with more units that costs more than smaller slots save."""


class Part(NamedTuple):
    """Rows of one tensor: `n_bytes` at `offset` of file number `file`. It may be cut at multiples of `step_bytes`."""

    tensor: str
    first_row: int
    rows: int
    file: int
    offset: int
    n_bytes: int
    step_bytes: int


class Read(NamedTuple):
    """One request to a store: the bytes land in the unit's memory from `at` on, at `at + offset % 4096`."""

    file: int
    offset: int
    n_bytes: int
    at: int


class Unit(NamedTuple):
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
    return Part(info.name, first_row, rows, info.file, offset, rows * info.row_bytes, info.row_step * info.row_bytes)


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


def split(unit: Unit, room: int) -> tuple[Unit, Unit] | None:
    """Cut a unit in two, the first as large as `room` bytes of memory allow; None if no row step of it fits."""
    head: list[Part] = []
    parts = list(unit.parts)
    while parts and make_unit([*head, parts[0]]).span_bytes <= room:
        head.append(parts.pop(0))
    if parts:
        part = parts[0]
        taken = make_unit(head).span_bytes if head else 0
        steps = max(room - taken - PAGE, 0) // part.step_bytes
        while steps and make_unit([*head, cut_part(part, 0, steps)]).span_bytes > room:
            steps -= 1
        if steps:
            head.append(cut_part(part, 0, steps))
            parts[0] = cut_part(part, steps, None)
    return (make_unit(head), make_unit(parts)) if head and parts else None


def cut_part(part: Part, start: int, stop: int | None) -> Part:
    """Return the row steps [start, stop) of a part; `stop` None: all that follow."""
    step_rows = part.rows * part.step_bytes // part.n_bytes
    first = start * step_rows
    rows = part.rows - first if stop is None else (stop - start) * step_rows
    return part._replace(
        first_row=part.first_row + first,
        rows=rows,
        offset=part.offset + start * part.step_bytes,
        n_bytes=part.n_bytes // part.rows * rows,
    )


def requests(parts: Iterable[Part], most_bytes: int) -> list[tuple[int, int, int]]:
    """Return the byte ranges (file, offset, bytes) that fetch `parts`, each of about `most_bytes` at the most.

    Cut where parts may be cut, so that a range holds whole steps of rows. Parts that touch share a range.
    """
    ranges: list[list[int]] = []
    for part in sorted(parts, key=lambda part: (part.file, part.offset)):
        block = max(most_bytes // part.step_bytes, 1) * part.step_bytes
        for start in range(part.offset, part.offset + part.n_bytes, block):
            stop = min(start + block, part.offset + part.n_bytes)
            last = ranges[-1] if ranges else None
            if last and last[0] == part.file and 0 <= start - last[2] < PAGE and stop - last[1] <= most_bytes:
                last[2] = stop
            else:
                ranges.append([part.file, start, stop])
    return [(file, start, stop - start) for file, start, stop in ranges]


def smallest_slot(tensors: Sequence[TensorInfo]) -> int:
    """Return the bytes of the smallest slot that every matrix can be cut for, and not into more than `MAX_UNITS`."""
    rows = max(span(PAGE - 1, min(info.row_step, info.n_rows) * info.row_bytes) for info in tensors)
    return max(rows, align_up(sum(info.n_bytes for info in tensors) // MAX_UNITS))


def merge(units: Sequence[Unit]) -> Unit:
    """Return neighbouring units as one: rows of a matrix that were cut apart are whole again."""
    parts: list[Part] = []
    for part in (part for unit in units for part in unit.parts):
        last = parts[-1] if parts else None
        if last and last.tensor == part.tensor and last.first_row + last.rows == part.first_row:
            parts[-1] = last._replace(rows=last.rows + part.rows, n_bytes=last.n_bytes + part.n_bytes)
        else:
            parts.append(part)
    return make_unit(parts)


def concatenate(units: Sequence[Unit]) -> Unit:
    """Return neighbouring units as one, in the parts that they have."""
    return make_unit(part for unit in units for part in unit.parts)


def constants(tensors: Mapping[str, TensorInfo], names: Iterable[str], tables: Collection[str] = ()) -> Unit:
    """Return the unit of all vectors among `names`, and of small `tables`: they are pinned whatever the budget."""
    return make_unit(part_of(tensors[name]) for name in names if tensors[name].n_rows == 1 or name in tables)


def _pieces(info: TensorInfo, slot_bytes: int) -> list[Part]:
    whole = part_of(info)
    if span(PAGE - 1, whole.n_bytes) <= slot_bytes:
        return [whole]
    step = info.row_step
    fitting = max((slot_bytes - 2 * PAGE) // info.row_bytes // step * step, step)
    n_pieces = -(-info.n_rows // fitting)
    rows = -(-info.n_rows // n_pieces // step) * step
    return [part_of(info, first, min(rows, info.n_rows - first)) for first in range(0, info.n_rows, rows)]
