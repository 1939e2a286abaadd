"""Segments become programs: steps that build arrays, evaluated as they go.

Scratch memory is what the values of a segment take while they live, what may be promised before it is computed, what
one operation makes at most, and the freed arrays that MLX keeps for the next ones.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from edgelm.engine.backend import Bindings, PassShape
from edgelm.engine.ir import Segment, Weight
from edgelm.errors import Cancelled, UnsupportedModel
from edgelm_mlx import rows
from edgelm_mlx.attention import lower_attend
from edgelm_mlx.forms import TYPES
from edgelm_mlx.frame import LIMITS, Frame, Limits, Site, Step, at, hold_vector
from edgelm_mlx.matrices import Matrix, hold, lower_embed, lower_linear
from edgelm_mlx.runtime import RUNNING, device, load, stream

LOWERINGS: dict[str, Callable[[Site], Step]] = {
    "embed": lower_embed,
    "rms_norm": rows.lower_rms_norm,
    "linear": lower_linear,
    "concat": rows.lower_concat,
    "slice": rows.lower_slice,
    "add": rows.lower_add,
    "mul": rows.lower_mul,
    "gate": rows.lower_gate,
    "scale": rows.lower_scale,
    "softcap": rows.lower_softcap,
    "rope": rows.lower_rope,
    "attend": lower_attend,
    "select": rows.lower_select,
}


class MlxSession:
    """An open MLX. While it is open, MLX keeps no more than its limit of freed memory in this process."""

    def __init__(self) -> None:
        self.mx = load()
        self.device = device()
        self.limits = LIMITS[self.device]
        self._aborted = False
        self.adopted: dict[int, Matrix] = {}
        self._n_adopted = 0
        self.mx.set_cache_limit(self.limits.cache_bytes)

    def compile(self, segment: Segment, shape: PassShape) -> MlxProgram:
        """Lower a segment. Raises `UnsupportedModel` for an operation or a tensor type that this backend lacks."""
        return MlxProgram(self, segment, shape, _lower(segment, shape, self.limits))

    def scratch_bytes(self, segment: Segment, shape: PassShape) -> int:
        steps = _lower(segment, shape, self.limits)
        most = max(living + step.atom_bytes for living, step in zip(_living_bytes(segment, shape), steps, strict=True))
        return most + self.limits.flush_bytes + self.limits.cache_bytes

    def reserve(self, scratch_bytes: int) -> None:
        """Nothing to do: MLX allocates as it computes."""

    def use_threads(self, n_threads: int) -> None:
        """Nothing to do: see `MlxBackend.open`."""

    def abort(self, on: bool) -> None:
        self._aborted = on

    def check(self) -> None:
        """Raise `Cancelled` if the computation is to stop."""
        if self._aborted:
            raise Cancelled("the computation was stopped; start it again to go on")

    def adopt(self, weight: Weight, address: int, matrix: bool) -> int:
        """Copy a weight; return the negative number that stands for it in `Bindings.weights`."""
        self._n_adopted += 1
        with RUNNING, self.mx.stream(stream(self.device)):
            if matrix:
                copy = hold(self.mx, weight, address, 0, weight.rows)
            else:
                copy = (hold_vector(self.mx, weight, address),)
            self.mx.eval(copy)
            self.adopted[-self._n_adopted] = copy
        return -self._n_adopted

    def drop(self, handle: int) -> None:
        """Give the memory of an adopted weight back."""
        del self.adopted[handle]
        self.mx.clear_cache()

    def close(self) -> None:
        self.adopted.clear()
        self.mx.clear_cache()


@dataclass(frozen=True, slots=True)
class MlxProgram:
    """A compiled segment."""

    session: MlxSession
    segment: Segment
    shape: PassShape
    steps: tuple[Step, ...]

    def run(self, bindings: Bindings) -> None:
        mx, segment = self.session.mx, self.segment
        last_use = _last_use(segment)
        with RUNNING, mx.stream(stream(self.session.device)):
            frame = Frame(self.session, self.shape, bindings)
            for value, address in zip(segment.inputs, bindings.inputs, strict=True):
                frame.values[value] = mx.array(at(address, _extent(segment, self.shape, value), np.float32))
            for index, (op, step) in enumerate(zip(segment.ops, self.steps, strict=True)):
                self.session.check()
                step.run(frame)
                for value in {*op.inputs, op.output}:
                    if last_use[value] <= index:
                        del frame.values[value]
            for value, address in zip(segment.outputs, bindings.outputs, strict=True):
                frame.write_later(frame.values[value], at(address, _extent(segment, self.shape, value), np.float32))
            frame.flush()


def _lower(segment: Segment, shape: PassShape, limits: Limits) -> tuple[Step, ...]:
    steps, first_weight = [], 0
    for op in segment.ops:
        lower = LOWERINGS.get(op.kind)
        if lower is None:
            raise UnsupportedModel(f"the mlx backend has no operation {op.kind!r}; use a newer edgelm")
        for weight in op.weights:
            if weight.type not in TYPES:
                raise UnsupportedModel(
                    f"the mlx backend cannot read {weight.type.name} weights; use another quantization"
                )
        made = segment.values[op.output]
        steps.append(lower(Site(op, first_weight, shape.rows(made.per), made.width, shape, limits)))
        first_weight += len(op.weights)
    return tuple(steps)


def _last_use(segment: Segment) -> dict[int, int]:
    """Return the index of the last operation that needs each value; those that leave the segment are kept."""
    last = {value: index for index, op in enumerate(segment.ops) for value in (op.output, *op.inputs)}
    last.update(dict.fromkeys(segment.outputs, len(segment.ops)))
    return last


def _living_bytes(segment: Segment, shape: PassShape) -> list[int]:
    """Return, for each operation, the bytes of the values alive while it runs, its output among them."""
    last_use, found = _last_use(segment), []
    alive = {value: _value_bytes(segment, shape, value) for value in segment.inputs}
    for index, op in enumerate(segment.ops):
        alive[op.output] = _value_bytes(segment, shape, op.output)
        found.append(sum(alive.values()))
        for value in {*op.inputs, op.output}:
            if last_use[value] <= index:
                del alive[value]
    return found


def _extent(segment: Segment, shape: PassShape, value: int) -> tuple[int, int]:
    return shape.rows(segment.values[value].per), segment.values[value].width


def _value_bytes(segment: Segment, shape: PassShape, value: int) -> int:
    n_rows, width = _extent(segment, shape, value)
    return 4 * n_rows * width
