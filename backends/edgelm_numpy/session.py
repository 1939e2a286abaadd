"""Segments become programs: steps, and a place in scratch memory for every value that lives inside a segment.

All scratch memory of a session is one block, which its programs share: the values first, then the lanes' parts.
What NumPy allocates besides, for a moment, is estimated by each step and counted too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgelm.engine.backend import Bindings, PassShape
from edgelm.engine.ir import Segment
from edgelm.engine.lanes import BlasThreads, Lanes, quiet
from edgelm.errors import UnsupportedModel
from edgelm.files.blocks import TYPES, Floats
from edgelm_numpy import rows
from edgelm_numpy.attention import lower_attend, lower_encode
from edgelm_numpy.frame import Frame, Site, Step, at
from edgelm_numpy.matrices import lower_embed, lower_linear

ALIGNMENT = 64

LOWERINGS: dict[str, Callable[[Site], Step]] = {
    "embed": lower_embed,
    "rms_norm": rows.lower_rms_norm,
    "layer_norm": rows.lower_layer_norm,
    "linear": lower_linear,
    "concat": rows.lower_concat,
    "slice": rows.lower_slice,
    "add": rows.lower_add,
    "mul": rows.lower_mul,
    "gate": rows.lower_gate,
    "activate": rows.lower_activate,
    "add_row": rows.lower_add_row,
    "add_positions": rows.lower_add_positions,
    "scale": rows.lower_scale,
    "softcap": rows.lower_softcap,
    "rope": rows.lower_rope,
    "attend": lower_attend,
    "encode": lower_encode,
    "select": rows.lower_select,
}


class NumpySession:
    """Computes on `n_threads` lanes. While it is open, the OpenBLAS of the process stays on one thread."""

    def __init__(self, n_threads: int) -> None:
        self.lanes = Lanes(n_threads)
        self._blas = BlasThreads()
        self._blas.hold()
        self._closed = False
        self._scratch: NDArray[np.uint8] = np.empty(0, np.uint8)
        self._reserved: int | None = None

    def compile(self, segment: Segment, shape: PassShape) -> NumpyProgram:
        """Lower a segment. Raises `UnsupportedModel` for an operation or a tensor type that this backend lacks."""
        recipe = _Recipe.of(segment, shape, self.lanes.n)
        assert self._reserved is None or recipe.scratch_bytes <= self._reserved, "more scratch memory than reserved"
        return NumpyProgram(self, segment, shape, recipe)

    def scratch_bytes(self, segment: Segment, shape: PassShape) -> int:
        return _Recipe.of(segment, shape, self.lanes.n).scratch_bytes

    def reserve(self, scratch_bytes: int) -> None:
        self._scratch = np.empty(scratch_bytes + ALIGNMENT, np.uint8)  # pages are taken when they are first written
        self._reserved = scratch_bytes

    def use_threads(self, n_threads: int) -> None:
        self.lanes.active = n_threads

    def abort(self, on: bool) -> None:
        self.lanes.aborted = on

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self.lanes.close()
            self._blas.release()
            self._scratch = np.empty(0, np.uint8)

    def scratch(self, n_bytes: int) -> NDArray[np.uint8]:
        """Return the shared block; it stays the same until a program needs a larger one."""
        if len(self._scratch) < n_bytes + ALIGNMENT:
            self._scratch = np.empty(n_bytes + ALIGNMENT, np.uint8)
        start = -self._scratch.ctypes.data % ALIGNMENT
        return self._scratch[start : start + n_bytes]


class NumpyProgram:
    """A compiled segment."""

    def __init__(self, session: NumpySession, segment: Segment, shape: PassShape, recipe: _Recipe) -> None:
        self._session, self._segment, self._shape, self._recipe = session, segment, shape, recipe

    def run(self, bindings: Bindings) -> None:
        segment, recipe, lanes = self._segment, self._recipe, self._session.lanes
        scratch = self._session.scratch(recipe.block_bytes)
        floats = scratch.view(np.float32)
        values: dict[int, Floats] = {}
        for ids, addresses in ((segment.inputs, bindings.inputs), (segment.outputs, bindings.outputs)):
            for value, address in zip(ids, addresses, strict=True):
                values[value] = at(address, self._extent(value), np.float32)
        for value, offset in recipe.offsets.items():
            n_rows, width = self._extent(value)
            values[value] = floats[offset // 4 :][: n_rows * width].reshape(n_rows, width)
        lane_floats = recipe.lane_bytes // 4
        work = [floats[recipe.values_bytes // 4 + lane * lane_floats :][:lane_floats] for lane in range(lanes.n)]
        frame = Frame(self._shape, bindings, values, lanes, work)
        with quiet():
            for step in recipe.steps:
                lanes.check()
                step.run(frame)

    def _extent(self, value: int) -> tuple[int, int]:
        described = self._segment.values[value]
        return self._shape.rows(described.per), described.width


@dataclass(frozen=True, slots=True)
class _Recipe:
    steps: tuple[Step, ...]
    offsets: dict[int, int]
    values_bytes: int
    lane_bytes: int
    n_lanes: int

    @property
    def block_bytes(self) -> int:
        return self.values_bytes + self.n_lanes * self.lane_bytes

    @property
    def scratch_bytes(self) -> int:
        return self.block_bytes + max((step.heap_bytes for step in self.steps), default=0)

    @classmethod
    def of(cls, segment: Segment, shape: PassShape, n_lanes: int) -> _Recipe:
        steps, first_weight = [], 0
        for op in segment.ops:
            lower = LOWERINGS.get(op.kind)
            if lower is None:
                raise UnsupportedModel(f"the numpy backend has no operation {op.kind!r}; use a newer edgelm")
            for weight in op.weights:
                if weight.type not in TYPES:
                    raise UnsupportedModel(
                        f"the numpy backend cannot read {weight.type.name} weights; use another quantization"
                    )
            made = segment.values[op.output]
            steps.append(lower(Site(op, first_weight, shape.rows(made.per), made.width, shape, n_lanes)))
            first_weight += len(op.weights)
        offsets, values_bytes = _places(segment, shape)
        lane_bytes = _aligned(4 * max((step.lane_floats for step in steps), default=0))
        return cls(tuple(steps), offsets, values_bytes, lane_bytes, n_lanes)


def _places(segment: Segment, shape: PassShape) -> tuple[dict[int, int], int]:
    """Give every value that begins and ends inside the segment an offset that no living value covers."""
    last_use = {value: index for index, op in enumerate(segment.ops) for value in (op.output, *op.inputs)}
    bound = {*segment.inputs, *segment.outputs}
    offsets: dict[int, int] = {}
    living: list[tuple[int, int, int]] = []  # offset, end, value
    total = 0
    for index, op in enumerate(segment.ops):
        if op.output not in bound:
            described = segment.values[op.output]
            size = _aligned(4 * shape.rows(described.per) * described.width)
            start = 0
            for other_start, other_end, _ in sorted(living):
                if start + size <= other_start:
                    break
                start = max(start, other_end)
            offsets[op.output] = start
            living.append((start, start + size, op.output))
            total = max(total, start + size)
        living = [place for place in living if last_use[place[2]] > index]
    return offsets, total


def _aligned(n_bytes: int) -> int:
    return -(-n_bytes // ALIGNMENT) * ALIGNMENT
