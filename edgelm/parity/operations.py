"""Operation by operation: the oracle computes a model, and another backend each step again from the same numbers.

So an error shows where it arises, before later layers spread it. One matrix is in memory at a time.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from edgelm.engine.architecture import record
from edgelm.engine.backend import Backend, Bindings, CacheGroup, PassShape, layout_of
from edgelm.engine.health import ORACLE
from edgelm.engine.ir import AttendSpec, Op, Trace, Value, place
from edgelm.engine.loading import computable, open_path
from edgelm.engine.registry import get_architecture, get_backend
from edgelm.files.model import ModelFile
from edgelm.parity.measures import Floats, nmse
from edgelm.testing.evaluate import Bytes, Cache, aligned, causal_mask, copied, packed_rows, read_rows

MOST = 8
"""Operations of one kind that are compared, from the first block on: conversions of every matrix would take long."""
HEAD_ROWS = 8192
"""Rows of a matrix that are computed at most: of the output head, a part tells enough."""
PLACES = 256


class _Pass(NamedTuple):
    first: int
    ids: Sequence[int]

    @property
    def positions(self) -> NDArray[np.int32]:
        return np.arange(self.first, self.first + len(self.ids), dtype=np.int32)


def errors_of(path: str | os.PathLike[str], name: str, ids: Sequence[int], n_threads: int) -> dict[str, float]:
    """Return the largest NMSE of each kind of operation of a model, linear and embed by tensor type.

    All but the last of `ids` are one pass, as of a prompt; the last one is a decode step. Raises what opening and
    recording a model raise, and what the backend does.
    """
    file = open_path(path)
    assert 1 < len(ids) <= PLACES
    errors: dict[str, float] = {}
    oracle, other = (_Single(get_backend(backend), file, n_threads) for backend in (ORACLE, name))
    try:
        for step in (_Pass(0, ids[:-1]), _Pass(len(ids) - 1, ids[-1:])):
            for label, error in _compare(step, oracle, other):
                errors[label] = max(errors.get(label, 0.0), error)
    finally:
        oracle.session.close()
        other.session.close()
    return errors


def _compare(step: _Pass, oracle: _Single, other: _Single) -> Iterator[tuple[str, float]]:
    ops = oracle.trace.ops
    last_use = {value: i for i, op in enumerate(ops) for value in op.inputs}
    numbers: dict[int, Floats] = {}
    seen: Counter[str] = Counter()
    for i, (op, same) in enumerate(zip(ops, other.trace.ops, strict=True)):  # weights may be of other types
        expected = oracle.run(op, numbers, step)
        label = _label(op)
        seen[label] += 1
        if seen[label] <= MOST:
            yield label, nmse(other.run(same, numbers, step), expected)
        numbers[op.output] = expected
        for value in op.inputs:
            if last_use[value] == i:
                numbers.pop(value, None)


def _label(op: Op) -> str:
    if op.kind in ("linear", "embed"):
        return f"{op.kind} {op.weights[0].type.name}"
    return f"gate {op.params}" if op.kind == "gate" else op.kind


class _Single:
    """A backend's session that computes one operation at a time, with a cache of its own."""

    def __init__(self, backend: Backend, file: ModelFile, n_threads: int) -> None:
        self._model, _, _ = computable(file, backend)
        self.trace: Trace = record(get_architecture(file.architecture), self._model, PLACES)
        self._cache = backend.capabilities().cache
        self._windows = [window for _, window in sorted({(spec.group, spec.window) for spec in self.trace.attends})]
        self._caches: dict[int, Cache] = {}
        self.session = backend.open(n_threads)
        self._layout = layout_of(backend)

    def run(self, op: Op, numbers: Mapping[int, Floats], step: _Pass) -> Floats:
        """Return what `op` makes of `numbers`, [n, width]."""
        op, width = self._shortened(op, numbers)
        n = len(step.ids)
        values = {value: Value(numbers[value].shape[1], self.trace.values[value].per) for value in op.inputs}
        placed = place(
            [op], {**values, op.output: Value(width, self.trace.values[op.output].per)}, frozenset([op.output])
        )
        shape = PassShape(n, n, tuple(CacheGroup(PLACES, PLACES) for _ in self._windows))
        inputs = [copied(numbers[value]) for value in placed.inputs]
        weights = [self._weight(op, i, step) for i in range(len(op.weights))]
        keys, values_ = self._caches_of(op)
        output = aligned(n * width * 4).view(np.float32).reshape(n, width)
        output.fill(np.nan)
        positions, rows = step.positions, np.arange(n, dtype=np.int32)
        places = positions.astype(np.int64)
        masks = [causal_mask(positions, PLACES, window) for window in self._windows]
        self.session.reserve(self.session.scratch_bytes(placed.segment, shape))
        self.session.compile(placed.segment, shape).run(
            Bindings(
                inputs=tuple(array.ctypes.data for array in inputs),
                outputs=(output.ctypes.data,),
                weights=tuple(weight.ctypes.data for weight in weights),
                keys=keys,
                values=values_,
                positions=positions.ctypes.data,
                out_rows=rows.ctypes.data,
                places=tuple(places.ctypes.data for _ in masks),
                masks=tuple(mask.ctypes.data for mask in masks),
            )
        )
        return output

    def _shortened(self, op: Op, numbers: Mapping[int, Floats]) -> tuple[Op, int]:
        """Return `op` with the first rows of a very tall matrix, and the width of what it makes."""
        width = self.trace.values[op.output].width
        if op.kind == "linear" and len(op.weights) == 1 and width > HEAD_ROWS:
            return op._replace(weights=(op.weights[0]._replace(rows=HEAD_ROWS),)), HEAD_ROWS
        if op.kind in ("scale", "softcap"):  # of a shortened head
            return op, numbers[op.inputs[0]].shape[1]
        return op, width

    def _weight(self, op: Op, i: int, step: _Pass) -> Bytes:
        weight = op.weights[i]
        if op.kind == "embed":
            return copied(
                np.concatenate([read_rows(self._model, weight._replace(rows=1, first_row=token)) for token in step.ids])
            )
        rows = read_rows(self._model, weight)
        matrix = op.kind == "linear" and i == 0
        return packed_rows(self._layout, self._model, weight, rows) if matrix else rows

    def _caches_of(self, op: Op) -> tuple[tuple[int, ...], tuple[int, ...]]:
        spec = op.params
        if not isinstance(spec, AttendSpec):
            return (), ()
        if spec.layer not in self._caches:
            self._caches[spec.layer] = Cache.of(spec, PLACES, self._cache)
        cache = self._caches[spec.layer]
        return (cache.keys.ctypes.data,), (cache.values.ctypes.data,)
