"""Cut a segment into stages, and a pass into work: what the NPU does in 8 bits, what the processor in float. Pure.

As in llm.npu (arXiv:2407.05858), products are the NPU's; norms, rotations, attention and activations are the
processor's, and so are the outliers of each product. Every stage is computed in chunks of a fixed number of rows.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from edgelm.engine.ir import Op, Per, Placed, Segment, place

WIDTHS = (1, 16, 128)
"""Rows that NPU programs are compiled for; a chunk with fewer is filled up with zeros."""
CHUNK = WIDTHS[-1]

Kind = Literal["cpu", "npu", "select"]


def padded(rows: int) -> int:
    """Return the rows of the smallest NPU program that holds `rows`."""
    return next(width for width in WIDTHS if width >= rows)


def n_chunks(rows: int) -> int:
    return -(-rows // CHUNK)


class Stage(NamedTuple):
    """Operations that run in one go for one chunk; `weights[i]` is where those of `ops[i]` begin among the segment's.

    `placed` is the stage as a segment of its own, for the processor's part. Rows of `per` "output" are those whose
    logits are wanted; a select makes them from all rows of the pass.
    """

    kind: Kind
    per: Per
    ops: tuple[Op, ...]
    weights: tuple[int, ...]
    placed: Placed | None

    @property
    def in_turn(self) -> bool:
        """Whether chunks must come one after the other: each attends to what those before have stored."""
        return any(op.kind == "attend" for op in self.ops)


class Work(NamedTuple):
    """One chunk of a stage, `rows` of it: on the processor, on the NPU, or the outliers of what is on the NPU.

    It begins after the work that `after` names, by its place in the list.
    """

    stage: int
    part: Literal["cpu", "npu", "outliers"]
    chunk: int
    rows: int
    after: tuple[int, ...]


def stages(segment: Segment) -> tuple[Stage, ...]:
    """Return the stages of a segment, in order. A product of a product begins a new stage."""
    groups: list[tuple[Kind, Per, list[int]]] = []
    made_here: set[int] = set()
    for i, op in enumerate(segment.ops):
        kind: Kind = "npu" if op.kind == "linear" else "select" if op.kind == "select" else "cpu"
        per = segment.values[op.output].per
        chained = kind == "npu" and not made_here.isdisjoint(op.inputs)
        if not groups or groups[-1][:2] != (kind, per) or chained:
            groups.append((kind, per, []))
            made_here = set()
        groups[-1][2].append(i)
        made_here.add(op.output)
    values, n_weights = dict(enumerate(segment.values)), [0]
    for op in segment.ops:
        n_weights.append(n_weights[-1] + len(op.weights))
    made = []
    for kind, per, chosen in groups:
        later = {value for op in segment.ops[chosen[-1] + 1 :] for value in op.inputs}
        ops = tuple(segment.ops[i] for i in chosen)
        placed = place(ops, values, frozenset(later.union(segment.outputs))) if kind == "cpu" else None
        made.append(Stage(kind, per, ops, tuple(n_weights[i] for i in chosen), placed))
    return tuple(made)


class _Lister:
    """Lists work, and remembers for every chunk what its next stage waits for."""

    def __init__(self, parts: tuple[Stage, ...]) -> None:
        self.parts, self.work = parts, list[Work]()
        self.last: dict[tuple[Per, int], tuple[int, ...]] = {}
        self._stored: dict[int, int] = {}  # the chunk before, of stages that keep order

    def add(self, stage: int, chunk: int, rows: int) -> None:
        part = self.parts[stage]
        waits = self.last.get((part.per, chunk), ())
        if part.kind == "npu":
            self.last[part.per, chunk] = (len(self.work), len(self.work) + 1)
            self.work += (Work(stage, "npu", chunk, rows, waits), Work(stage, "outliers", chunk, rows, waits))
            return
        if part.in_turn and stage in self._stored:
            waits += (self._stored[stage],)
        self._stored[stage] = len(self.work)
        self.last[part.per, chunk] = (len(self.work),)
        self.work.append(Work(stage, "cpu", chunk, rows, waits))

    def select(self, stage: int, rows: int) -> None:
        waits = dict.fromkeys(i for indices in self.last.values() for i in indices)
        for chunk in range(n_chunks(rows)):
            self.last["output", chunk] = (len(self.work),)
        self.work.append(Work(stage, "cpu", 0, rows, tuple(waits)))


def work_of(parts: tuple[Stage, ...], n_tokens: int, n_outputs: int) -> tuple[Work, ...]:
    """Return the work of a pass, chunk after chunk.

    Stages of a chunk follow each other, so that values that end may give their place to those that begin.
    """
    lister = _Lister(parts)
    of_tokens = [i for i, part in enumerate(parts) if part.per == "token"]
    for chunk in range(n_chunks(n_tokens)):
        for stage in of_tokens:
            lister.add(stage, chunk, min(CHUNK, n_tokens - chunk * CHUNK))
    for stage, part in enumerate(parts):
        if part.kind == "select":
            lister.select(stage, n_outputs)
        elif part.per == "output":
            for chunk in range(n_chunks(n_outputs)):
                lister.add(stage, chunk, min(CHUNK, n_outputs - chunk * CHUNK))
    return tuple(lister.work)
