"""Compute logits the plainest way: all weights in memory, one segment, no window and no plan.

For tests of architectures and backends; it uses as much memory as the file has weights.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import numpy.typing as npt

from edgelm.engine.architecture import record
from edgelm.engine.backend import Bindings, CacheGroup, CacheLayout, PassShape, Session, WeightLayout, layout_of
from edgelm.engine.ir import AttendSpec, Placed, Trace, Weight, place
from edgelm.engine.loading import computable, open_path
from edgelm.engine.preparing import packed_bytes
from edgelm.engine.registry import get_architecture, get_backend
from edgelm.errors import ContextOverflow
from edgelm.files.model import ModelFile
from edgelm.memory.buffer import Buffer
from edgelm.memory.derived import derived
from edgelm.memory.stores import open_store, span

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]

_ALIGNMENT = 4096
_CAPACITY_STEP = 256


def evaluate(
    path: str | os.PathLike[str],
    token_ids: Sequence[int],
    *,
    backend: str = "numpy",
    n_context: int | None = None,
    passes: Sequence[int] | None = None,
    n_threads: int = 1,
) -> Floats:
    """Return the logits after every token, [n_tokens, n_vocab], of the model at `path`.

    `passes` says how many tokens each pass takes: `(40, 1, 1)` is a prompt and two decode steps; all at once without.
    `n_context` defaults to the training's. Raises what opening and recording the model raise.
    """
    model, _, _ = computable(open_path(path), get_backend(backend))
    if n_context is None:
        n_context = int(model.metadata[f"{model.architecture}.context_length"])
    if len(token_ids) > n_context:
        raise ContextOverflow(len(token_ids), n_context)
    sizes = (len(token_ids),) if passes is None else tuple(passes)
    assert sum(sizes) == len(token_ids), f"passes of {sizes} do not cover {len(token_ids)} tokens"
    chosen = get_backend(backend)
    session = chosen.open(n_threads)
    run = _Run(model, n_context, session, layout_of(chosen), chosen.capabilities().cache)
    try:
        return np.concatenate([run.step(np.asarray(ids)) for ids in _split(token_ids, sizes)])
    finally:
        run.session.close()


def _split(token_ids: Sequence[int], sizes: Sequence[int]) -> Iterator[Sequence[int]]:
    start = 0
    for size in sizes:
        yield token_ids[start : start + size]
        start += size


class _Run:
    """A model, its caches, and how many tokens they hold."""

    def __init__(
        self, model: ModelFile, n_context: int, session: Session, layout: WeightLayout | None, cache: CacheLayout
    ) -> None:
        self.session = session
        trace: Trace = record(get_architecture(model.architecture), model, n_context)
        self._placed: Placed = place(trace.ops, trace.values, frozenset({trace.logits}))
        self._table = next(op.weights[0] for op in trace.ops if op.kind == "embed")
        self._embeds = [op.kind == "embed" for op in trace.ops for _ in op.weights]
        self._n_vocab = trace.values[trace.logits].width
        used = dict.fromkeys(op.weights[0] for op in trace.ops if op.kind == "linear")
        self._weights = {weight: read_rows(model, weight) for weight in trace.weights()}
        self._matrices = {weight: packed_rows(layout, model, weight, self._weights[weight]) for weight in used}
        self._capacity = -(-n_context // _CAPACITY_STEP) * _CAPACITY_STEP
        self._caches = [Cache.of(spec, self._capacity, cache) for spec in trace.attends]
        by_group = sorted(trace.attends, key=lambda spec: spec.group)
        self._windows = [next(specs).window for _, specs in groupby(by_group, key=lambda spec: spec.group)]
        self._n_past = 0

    def step(self, ids: npt.NDArray[np.int64]) -> Floats:
        """Take one pass over `ids` and return its logits."""
        n = len(ids)
        shape = PassShape(n, n, tuple(CacheGroup(self._capacity, self._capacity) for _ in self._windows))
        program = self.session.compile(self._placed.segment, shape)
        positions = np.arange(self._n_past, self._n_past + n, dtype=np.int32)
        out_rows = np.arange(n, dtype=np.int32)
        places = positions.astype(np.int64)
        masks = [causal_mask(positions, self._capacity, window) for window in self._windows]
        gathered = copied(self._weights[self._table].reshape(self._table.rows, -1)[ids])
        logits = aligned(n * self._n_vocab * 4).view(np.float32).reshape(n, self._n_vocab)
        weights = [
            gathered if embed else self._matrices.get(weight, self._weights[weight])
            for weight, embed in zip(self._placed.weights, self._embeds, strict=True)
        ]
        layers = self._placed.layers
        program.run(
            Bindings(
                inputs=(),
                outputs=(logits.ctypes.data,),
                weights=tuple(weight.ctypes.data for weight in weights),
                keys=tuple(self._caches[layer].keys.ctypes.data for layer in layers),
                values=tuple(self._caches[layer].values.ctypes.data for layer in layers),
                positions=positions.ctypes.data,
                out_rows=out_rows.ctypes.data,
                places=tuple(places.ctypes.data for _ in self._windows),
                masks=tuple(mask.ctypes.data for mask in masks),
            )
        )
        self._n_past += n
        return logits


@dataclass(frozen=True, slots=True)
class Cache:
    """Keys and values of a layer, laid out as backends expect them."""

    keys: Bytes
    values: Bytes

    @classmethod
    def of(cls, spec: AttendSpec, capacity: int, layout: CacheLayout) -> Cache:
        n = spec.n_kv_heads * capacity * np.dtype(layout.dtype).itemsize
        return cls(aligned(n * spec.head_dim_k), aligned(n * spec.head_dim_v))


def causal_mask(positions: npt.NDArray[np.int32], length: int, window: int) -> Floats:
    """Return the mask [n, length] of a cache where position p lies in place p."""
    distance = positions[:, None] - np.arange(length, dtype=np.int32)
    hidden = distance < 0
    if window:
        hidden |= distance >= window
    return np.where(hidden, np.float32(-np.inf), np.float32(0.0))


def read_rows(model: ModelFile, weight: Weight) -> Bytes:
    """Return the bytes of a weight's rows, as they are in the file."""
    info = model.tensors[weight.tensor]
    data = aligned(weight.rows * info.row_bytes)
    if weight.tensor in model.derived:
        store = derived(open_store([str(path) for path in model.paths])[0], model)
        start = info.offset + weight.first_row * info.row_bytes
        with Buffer(span(start, len(data))) as buffer:
            first = store.read_into(info.file, start, len(data), buffer.view, 0)
            data[:] = np.frombuffer(buffer.view, np.uint8, len(data), first)
        store.close()
        return data
    with open(model.paths[info.file], "rb") as file:
        file.seek(info.offset + weight.first_row * info.row_bytes)
        file.readinto(data.data)
    return data


def packed_rows(layout: WeightLayout | None, model: ModelFile, weight: Weight, data: Bytes) -> Bytes:
    """Return the rows of a matrix as the backend wants them; `data` are its bytes as in the file."""
    if layout is None:
        return data
    info = model.tensors[weight.tensor]
    rows = info._replace(shape=(weight.width, weight.rows), n_bytes=weight.rows * info.row_bytes)
    return copied(np.frombuffer(packed_bytes(layout, rows, data.tobytes()), np.uint8))


def copied(array: npt.NDArray[Any]) -> Bytes:
    """Return the bytes of an array at an address that kernels like."""
    copy = aligned(array.nbytes)
    copy[:] = np.frombuffer(array.tobytes(), np.uint8)
    return copy


def aligned(n_bytes: int) -> Bytes:
    """Return zeroed bytes whose address kernels like."""
    data = np.zeros(n_bytes + _ALIGNMENT, np.uint8)
    start = -data.ctypes.data % _ALIGNMENT
    return data[start : start + n_bytes]


def logits_error(ours: Floats, theirs: Floats) -> float:
    """Return the largest difference between logits, as a part of their spread."""
    return float(np.abs(ours - theirs).max() / theirs.std())
