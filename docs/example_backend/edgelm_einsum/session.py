"""Segments become programs that compute one operation after the other on arrays over the bound addresses."""

import numpy as np

from edgelm.engine.backend import Bindings, PassShape
from edgelm.engine.ir import AttendSpec, Segment
from edgelm.errors import Cancelled, UnsupportedModel
from edgelm_einsum import operations
from edgelm_einsum.memory import TYPES, at


class EinsumSession:
    def __init__(self) -> None:
        self.version = f"einsum of NumPy {np.__version__}"
        self.stopped = False

    def compile(self, segment: Segment, shape: PassShape) -> "EinsumProgram":
        for op in segment.ops:
            if op.kind not in operations.OPERATIONS:
                raise UnsupportedModel(f"the einsum backend has no operation {op.kind!r}; use another backend")
        for weight in segment.weights:
            if weight.type not in TYPES:
                raise UnsupportedModel(f"the einsum backend cannot read {weight.type.name}; use another backend")
        return EinsumProgram(self, segment, shape)

    def scratch_bytes(self, segment: Segment, shape: PassShape) -> int:
        """All values at once, the largest matrix in float32 (and on its way there), and the scores of attention."""
        values = sum(shape.rows(value.per) * value.width for value in segment.values)
        matrix = max((weight.rows * weight.width for weight in segment.weights), default=0)
        scores = max((self._attend_numbers(op.params, shape) for op in segment.ops if op.kind == "attend"), default=0)
        return 4 * (2 * values + 3 * matrix + scores)

    def _attend_numbers(self, spec: AttendSpec, shape: PassShape) -> int:
        length = shape.groups[spec.group].length
        caches = spec.n_kv_heads * length * (spec.head_dim_k + spec.head_dim_v)
        return 4 * spec.n_heads * shape.n_tokens * length + caches

    def reserve(self, scratch_bytes: int) -> None:
        """NumPy takes memory when it needs it."""

    def use_threads(self, n_threads: int) -> None:
        """There is one."""

    def abort(self, on: bool) -> None:
        self.stopped = on

    def close(self) -> None:
        pass


class EinsumProgram:
    def __init__(self, session: EinsumSession, segment: Segment, shape: PassShape) -> None:
        self.session, self.segment, self.shape = session, segment, shape

    def run(self, bindings: Bindings) -> None:
        segment, values = self.segment, {}
        for value, address in zip(segment.inputs, bindings.inputs, strict=True):
            values[value] = self._bound(value, address)
        addresses = iter(bindings.weights)
        for op in segment.ops:
            if self.session.stopped:
                raise Cancelled("the generation was stopped")
            weights = [(weight, next(addresses)) for weight in op.weights]
            operands = [values[value] for value in op.inputs]
            compute = operations.OPERATIONS[op.kind]
            values[op.output] = compute(op.params, operands, weights, bindings, self.shape)
        for value, address in zip(segment.outputs, bindings.outputs, strict=True):
            self._bound(value, address)[...] = values[value]

    def _bound(self, value: int, address: int) -> np.ndarray:
        described = self.segment.values[value]
        return at(address, (self.shape.rows(described.per), described.width), np.float32)
