"""A few recorded operations with everything they need to run: random inputs, weights, caches, masks.

For the contract suite of backends; see `edgelm.testing.backend_contract`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgelm.engine.backend import Adopting, Bindings, CacheGroup, CacheLayout, PassShape, Program, Session, WeightLayout
from edgelm.engine.ir import AttendSpec, Op, Placed, RopeSpec, Segment, Value, Weight, place
from edgelm.engine.ops import Ops, Tensor
from edgelm.engine.preparing import packed_bytes
from edgelm.files.ggml_types import TensorType, row_bytes
from edgelm.files.model import TensorInfo
from edgelm.memory.arena import depths
from edgelm.memory.cache_layout import USUAL
from edgelm.testing import reference
from edgelm.testing.blocks import random_weights
from edgelm.testing.stored import Stored, aligned

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]
Items = NDArray[Any]

_FIRST_CONCAT = 1 << 20  # ids of values that `Ops` does not know


class Recording:
    """Record with `ops`, on inputs from `value` and weights from `matrix`; then `run`.

    The pass has `n_tokens` rows from `first_position` on, written to `places` of the caches (else: their positions).
    With `parents` it is a tree: row i follows row `parents[i]`, or what is stored if that is -1, and sees nothing else;
    each row takes the place that it would have in a chain.
    Matrices and caches lie as `layout` and `cache` of the backend say.
    """

    def __init__(
        self,
        n_tokens: int,
        *,
        out_rows: Sequence[int] = (0,),
        capacity: int = 32,
        length: int = 32,
        places: Sequence[int] | None = None,
        first_position: int = 0,
        parents: Sequence[int] | None = None,
        layout: WeightLayout | None = None,
        cache: CacheLayout = USUAL,
    ) -> None:
        self._layout, self._cache_layout = layout, cache
        self.ops = Ops()
        self.n_tokens, self.capacity, self.length = n_tokens, capacity, length
        self._rng = np.random.default_rng(n_tokens)
        self._inputs: dict[int, Floats] = {}
        self._concats: list[tuple[Op, Value]] = []
        self._weights: dict[str, Bytes] = {}
        self._packed: dict[str, Bytes] = {}
        self._infos: dict[str, TensorInfo] = {}
        self._adopted: dict[tuple[Weight, bool], int] = {}
        self._caches: dict[int, tuple[Stored, Stored]] = {}
        self._position_of_place = np.full(length, -1, np.int32)
        self.out_rows = np.array(out_rows, np.int32)
        self.parents = parents
        self._begin(first_position)
        if places is not None:
            self.places = np.array(places, np.int64)

    def move_to(self, first_position: int) -> None:
        """Let the next run be the pass that begins at this position; what is in the caches stays."""
        self._begin(first_position)

    def _begin(self, first_position: int) -> None:
        steps = np.arange(self.n_tokens) if self.parents is None else depths(self.parents)
        self.positions = (first_position + steps).astype(np.int32)
        self.places = np.arange(first_position, first_position + self.n_tokens)

    def value(self, width: int, spread: float = 1.0) -> Tensor:
        """An input of random numbers, one row per token."""
        tensor = self.ops.embed(Weight(f"input {len(self._inputs)}", TensorType.F32, width, 1))
        numbers = self._rng.standard_normal((self.n_tokens, width), np.float32) * np.float32(spread)
        self._inputs[tensor.id] = aligned(numbers).view(np.float32).reshape(numbers.shape)
        return tensor

    def matrix(self, width: int, rows: int, kind: TensorType = TensorType.F32, mean: float = 0.0) -> Weight:
        """A random weight: a matrix whose products keep their size, or a vector (one row) of spread 1."""
        weight = Weight(f"weight {len(self._weights)}", kind, width, rows)
        spread = 1.0 if rows == 1 else width**-0.5
        data = np.frombuffer(random_weights(kind, width * rows, spread, self._rng), np.uint8)
        if mean:
            data = np.maximum(data.view(np.float32) + np.float32(mean), np.float32(mean / 4)).view(np.uint8)
        self._weights[weight.tensor] = aligned(data)
        info = TensorInfo(weight.tensor, kind, (width, rows), 0, 0, data.nbytes)
        self._infos[weight.tensor] = self._laid_out(info)
        if self._infos[weight.tensor].packed_row_bytes:
            packed = packed_bytes(self._layout, info, data.tobytes())
            self._packed[weight.tensor] = aligned(np.frombuffer(packed, np.uint8))
        return weight

    def _laid_out(self, info: TensorInfo) -> TensorInfo:
        packed = self._layout.packed(info) if self._layout is not None and info.n_rows > 1 else None
        if packed is None:
            return info
        return info._replace(row_step=packed.row_step, packed_row_bytes=packed.row_bytes)

    def row_step(self, weight: Weight) -> int:
        """Rows of a tile of this matrix: it may be cut at multiples of them."""
        return self._infos[weight.tensor].row_step

    def concat(self, parts: Sequence[Tensor]) -> Tensor:
        """Columns side by side, as the planner records them for the tiles of a matrix."""
        width, per = sum(part.width for part in parts), parts[0].per
        output = _FIRST_CONCAT + len(self._concats)
        op = Op("concat", tuple(part.id for part in parts), output)
        self._concats.append((op, Value(width, per)))
        return Tensor(output, width, per)

    def block(self, width: int = 64, hidden: int = 192) -> Tensor:
        """A transformer block of fifteen operations over one input."""
        ops, x, dim = self.ops, self.value(width), width // 4
        h = ops.rms_norm(x, self.matrix(width, 1), 1e-5)
        q, k, v = (ops.linear(h, self.matrix(width, heads * dim)) for heads in (4, 2, 2))
        q, k = (ops.rope(part, RopeSpec(part.width // dim, dim, True, 10000.0)) for part in (q, k))
        spec = AttendSpec(0, n_heads=4, n_kv_heads=2, head_dim_k=dim, head_dim_v=dim, scale=dim**-0.5)
        x = ops.add(x, ops.linear(ops.attend(q, k, v, spec), self.matrix(width, width)))
        h = ops.rms_norm(x, self.matrix(width, 1), 1e-5)
        gate, up = (ops.linear(h, self.matrix(width, hidden)) for _ in range(2))
        return ops.add(x, ops.linear(ops.gate(gate, up), self.matrix(hidden, width)))

    def inputs(self, value: Tensor) -> Floats:
        """The numbers of an input, to be written to before a run."""
        return self._inputs[value.id]

    def exact(self, value: Tensor) -> reference.Exact:
        return self._inputs[value.id].astype(np.float64)

    def exact_weight(self, weight: Weight) -> reference.Exact:
        """The weights as numbers, [rows, width] in float64."""
        # The decoder that is checked against ggml's own, bit for bit; the package gguf for what it lacks.
        from edgelm.files.blocks import TYPES, dequantize

        raw = self._weights[weight.tensor].reshape(-1, row_bytes(weight.type, weight.width))
        if weight.type in TYPES:
            return dequantize(weight.type, raw).astype(np.float64)
        import gguf

        kind = gguf.GGMLQuantizationType(int(weight.type))
        return np.asarray(gguf.quants.dequantize(raw, kind), np.float64)

    def exact_attend(self, q: Tensor, k: Tensor, v: Tensor, spec: AttendSpec) -> reference.Exact:
        """Attention over the cache that there should be, which this extends by the rows of the pass."""
        keys, values = self._cache(spec)
        for stored, tensor in ((keys, k), (values, v)):
            stored.store(self.places, self._inputs[tensor.id].reshape(self.n_tokens, spec.n_kv_heads, -1))
        seen = keys.exact[:, : self.length], values.exact[:, : self.length].transpose(0, 2, 1)
        return reference.attend(self.exact(q), *seen, self._mask(spec.window), spec)

    def caches(self, spec: AttendSpec) -> Iterator[tuple[Items, Items]]:
        """The layer's keys, then its values: what the backend made of them, and what they should be."""
        for stored in self._cache(spec):
            yield stored.made(), stored.exact

    def input_bytes(self) -> list[bytes]:
        return [array.tobytes() for arrays in (self._inputs, self._weights, self._packed) for array in arrays.values()]

    def relocate_weights(self) -> None:
        """Copy every weight to another address, and spoil the old one."""
        for weights in (self._weights, self._packed):
            for name, old in list(weights.items()):
                weights[name] = aligned(old)
                old.fill(0xFF)

    @contextmanager
    def adopted(self, session: Adopting) -> Iterator[None]:
        """Let the session copy every weight of what is recorded, spoil the originals, and bind the copies inside."""
        for op in self._kept():
            for i, weight in enumerate(op.weights):
                key = weight, op.kind == "linear" and i == 0
                if op.kind != "embed" and key not in self._adopted:
                    self._adopted[key] = session.adopt(weight, self._address(*key), key[1])
        kept = [
            (weights, name, array.copy())
            for weights in (self._weights, self._packed)
            for name, array in weights.items()
        ]
        for weights, name, _ in kept:
            weights[name].fill(0xFF)
        try:
            yield
        finally:
            for weights, name, content in kept:
                weights[name][:] = content
            while self._adopted:
                session.drop(self._adopted.popitem()[1])

    def segment(self, outputs: Sequence[Tensor]) -> tuple[Segment, PassShape]:
        """Everything recorded, as one segment, and the shape of the pass."""
        (placed,) = self._placed(outputs, ())
        return placed.segment, self._shape()

    def run(self, session: Session, outputs: Sequence[Tensor], cuts: Sequence[int] = ()) -> list[Floats]:
        """Compute `outputs`. `cuts`: where the operations are cut into segments that follow each other."""
        return self.program(session, outputs, cuts)()

    def program(
        self, session: Session, outputs: Sequence[Tensor], cuts: Sequence[int] = ()
    ) -> Callable[[], list[Floats]]:
        """Compile; every call computes with the weights where they are then, and returns the same arrays."""
        parts = self._placed(outputs, cuts)
        programs = [session.compile(part.segment, self._shape()) for part in parts]
        memory = dict(self._inputs)
        for part in parts:
            for value, local in zip(part.outputs, part.segment.outputs, strict=True):
                made = part.segment.values[local]
                empty = np.zeros((self._shape().rows(made.per), made.width), np.float32)
                memory[value] = aligned(empty).view(np.float32).reshape(empty.shape)
        for op in self._kept():
            if isinstance(op.params, AttendSpec):
                self._cache(op.params)

        def call() -> list[Floats]:
            for part, program in zip(parts, programs, strict=True):
                for value in part.outputs:
                    memory[value].fill(np.nan)
                self._run_part(part, program, memory)
            return [memory[output.id] for output in outputs]

        return call

    def _run_part(self, part: Placed, program: Program, memory: dict[int, Floats]) -> None:
        masks = [self._mask(window) for window in self._windows()]
        caches = [self._caches[layer] for layer in part.layers]
        program.run(
            Bindings(
                inputs=tuple(memory[value].ctypes.data for value in part.inputs),
                outputs=tuple(memory[value].ctypes.data for value in part.outputs),
                weights=tuple(self._bound(part)),
                keys=tuple(keys.address for keys, _ in caches),
                values=tuple(values.address for _, values in caches),
                positions=self.positions.ctypes.data,
                out_rows=self.out_rows.ctypes.data,
                places=tuple(self.places.ctypes.data for _ in masks),
                masks=tuple(mask.ctypes.data for mask in masks),
            )
        )

    def _placed(self, outputs: Sequence[Tensor], cuts: Sequence[int]) -> list[Placed]:
        kept = self._needed(outputs)
        values = {**self.ops.trace(outputs[0]).values, **{op.output: value for op, value in self._concats}}
        parts = [kept[start:stop] for start, stop in pairwise((0, *cuts, len(kept)))]
        wanted = {output.id for output in outputs}
        placed = []
        for index, part in enumerate(parts):
            later = {value for other in parts[index + 1 :] for op in other for value in op.inputs}
            placed.append(place(part, values, frozenset(wanted | later)))
        return placed

    def _needed(self, outputs: Sequence[Tensor]) -> list[Op]:
        """The operations that `outputs` come from, in order."""
        needed = {output.id for output in outputs}
        kept = []
        for op in reversed(self._kept()):
            if op.output in needed:
                needed.update(op.inputs)
                kept.append(op)
        return kept[::-1]

    def _kept(self) -> list[Op]:
        recorded = self.ops.trace(Tensor(0, 0, "token")).ops
        return [op for op in (*recorded, *(op for op, _ in self._concats)) if op.output not in self._inputs]

    def _windows(self) -> list[int]:
        windows = {op.params.group: op.params.window for op in self._kept() if isinstance(op.params, AttendSpec)}
        return [windows[group] for group in sorted(windows)]

    def _shape(self) -> PassShape:
        groups = tuple(CacheGroup(self.capacity, self.length) for _ in self._windows())
        return PassShape(self.n_tokens, len(self.out_rows), groups, self.parents is not None, self._cache_layout)

    def _mask(self, window: int) -> Floats:
        self._position_of_place[self.places] = self.positions
        distance = self.positions[:, None] - self._position_of_place
        hidden = (self._position_of_place < 0) | (distance < 0)
        if window:
            hidden |= distance >= window
        if self.parents is not None:
            hidden[:, self.places] |= ~self._is_ancestor()
        return np.where(hidden, np.float32(-np.inf), np.float32(0))

    def _is_ancestor(self) -> NDArray[np.bool_]:
        """Say of each row, and of each, whether the second comes before the first or is the same: [rows, rows]."""
        assert self.parents is not None
        found = np.eye(self.n_tokens, dtype=bool)
        for row, parent in enumerate(self.parents):
            if parent >= 0:
                found[row] |= found[parent]
        return found

    def _cache(self, spec: AttendSpec) -> tuple[Stored, Stored]:
        """Keys and values."""
        if spec.layer not in self._caches:
            layout, dims = self._cache_layout, (spec.head_dim_k, spec.head_dim_v)
            keys, values = (
                self._rng.standard_normal((spec.n_kv_heads, self.capacity, dim)).astype(np.float32) for dim in dims
            )
            items = layout.items
            self._caches[spec.layer] = Stored(items[0], "place_dim", keys), Stored(items[1], layout.values, values)
        return self._caches[spec.layer]

    def _bound(self, part: Placed) -> Iterator[int]:
        """Yield what the bindings of a part have for its weights."""
        weights = iter(part.weights)
        for op in part.segment.ops:
            for i, weight in enumerate(next(weights) for _ in op.weights):
                matrix = op.kind == "linear" and i == 0
                yield self._adopted.get((weight, matrix)) or self._address(weight, matrix)

    def _address(self, weight: Weight, matrix: bool) -> int:
        info = self._infos.get(weight.tensor)
        if matrix and info is not None and info.packed_row_bytes:
            return int(self._packed[weight.tensor][weight.first_row * info.row_bytes :].ctypes.data)
        start = weight.first_row * row_bytes(weight.type, weight.width)
        return int(self._weights[weight.tensor][start:].ctypes.data)
