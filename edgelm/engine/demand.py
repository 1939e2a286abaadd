"""What a model needs besides its matrices, for every prompt chunk that could be chosen.

Asks the backend and counts bytes; decides nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple, overload

from edgelm.engine.backend import CacheGroup, CacheLayout, PassShape, Session
from edgelm.engine.ir import SMALL_TABLES, Trace, place
from edgelm.engine.passes import WIDTHS
from edgelm.engine.segments import cut
from edgelm.engine.speculation import lookup, recycling
from edgelm.engine.state import ALIGN, FLOAT_BYTES, Layout, workspace_bytes
from edgelm.files.model import TensorInfo
from edgelm.memory.arena import LayerCache, cache_bytes, capacity
from edgelm.memory.buffer import align_up
from edgelm.memory.plan import Demand, Plan
from edgelm.memory.units import Unit, constants
from edgelm.memory.window import runs

if TYPE_CHECKING:
    from edgelm.engine.filtering import Filtering
    from edgelm.engine.spilling import Spilling

CHUNKS = (512, 256, 128, 64, 32, 16)
"""No narrower: passes of eight tokens and more have the same bits whatever their width, see `passes.first_width`."""
GRAPH_BYTES_PER_OP = 16_000
"""Compiled programs: tensors, graphs and the Python objects around them, for each recorded operation."""
RESERVE_BYTES = 3_000_000
"""Growth of interpreter and libraries while they run: code paged in, thread stacks, small objects."""
SAMPLING_COPIES = 4


class Model(NamedTuple):
    """A recorded model and its tensors: `matrices` in pass order, small vectors as the `constants` unit.

    `embedding` is what rows are looked up in; the matrix of the same name may lie elsewhere, in another layout.
    """

    trace: Trace
    tensors: Mapping[str, TensorInfo]
    matrices: tuple[TensorInfo, ...]
    constants: Unit
    layers: tuple[LayerCache, ...]
    embedding: TensorInfo

    @property
    def encodes(self) -> bool:
        """Whether a text is one pass, all of whose rows come out: nothing of it is cached."""
        return not self.layers

    @property
    def n_vocab(self) -> int:
        """Numbers in a row of what comes out."""
        return self.trace.values[self.trace.logits].width


def describe(
    trace: Trace, tensors: Mapping[str, TensorInfo], gathered: Mapping[str, TensorInfo] | None = None
) -> Model:
    """Sort the weights of a recorded model by how they are kept. `gathered`: see `ModelFile`."""
    used = dict.fromkeys(weight.tensor for op in trace.ops if op.kind != "embed" for weight in op.weights)
    layers = tuple(
        LayerCache(spec.group, spec.window, spec.n_kv_heads, spec.head_dim_k, spec.head_dim_v) for spec in trace.attends
    )
    tables = {weight.tensor for op in trace.ops if op.kind in SMALL_TABLES for weight in op.weights}
    matrices = tuple(tensors[name] for name in used if tensors[name].n_rows > 1 and name not in tables)
    looked_up = next(op.weights[0].tensor for op in trace.ops if op.kind == "embed")
    embedding = (gathered or {}).get(looked_up) or tensors[looked_up]
    return Model(trace, tensors, matrices, constants(tensors, used, tables), layers, embedding)


def most_shapes(n_rows: int) -> int:
    """Return how many compiled shapes are kept: a token, the prompt chunk, the rest of a prompt, and drafts."""
    return 3 + sum(1 < width <= n_rows for width in WIDTHS)


class Demands(Sequence[Demand]):
    """The demand of each chunk, from the largest to the smallest, computed when asked for."""

    def __init__(
        self,
        model: Model,
        session: Session,
        context: int,
        process_bytes: int,
        max_outputs: int,
        cache: CacheLayout,
        kept: tuple[int, int] | None = None,
        most_tokens: int | None = None,
        n_rows: int = 1,
        draft_bytes: int = 0,
        spilling: Spilling | None = None,
        filtering: Filtering | None = None,
    ) -> None:
        """`kept`: the chunk that a cache is made for, and its bytes, where that is decided already.

        `most_tokens`: no pass will have more. `n_rows`: rows of drafts that a pass can verify.
        `draft_bytes`: what a draft model takes. `spilling`: how much of the cache may go to flash; `model` is then what
        `spilling_of` returns. `filtering`: how long prompts are made shorter.
        """
        self._cache, self.spilling, self._filtering = cache, spilling, filtering
        self.apart = spilling.apart if spilling else frozenset([filtering.layer] if filtering else ())
        self._model, self._session, self._context = model, session, context
        self._process_bytes, self._max_outputs, self._kept = process_bytes, max_outputs, kept
        self._n_rows, self._draft_bytes = max(n_rows, max_outputs), draft_bytes
        self._guesses_bytes = recycling.TABLE_BYTES + lookup.BYTES_PER_TOKEN * context if n_rows > 1 else 0
        widest = min(context, kept[0] if kept else context, most_tokens or context)
        if model.encodes:
            self._n_rows = self._max_outputs = context
            self.chunks: tuple[int, ...] = (context,)
        else:  # all rows whose logits are wanted come from one pass
            self.chunks = tuple(chunk for chunk in CHUNKS if self._n_rows <= chunk <= widest)
        self._whole = place(model.trace.ops, model.trace.values, frozenset([model.trace.logits])).segment
        self._known: dict[int, Demand] = {}

    def __len__(self) -> int:
        return len(self.chunks)

    @overload
    def __getitem__(self, index: int) -> Demand: ...
    @overload
    def __getitem__(self, index: slice) -> list[Demand]: ...
    def __getitem__(self, index: int | slice) -> Demand | list[Demand]:
        if isinstance(index, slice):
            return [self._of(chunk) for chunk in self.chunks[index]]
        return self._of(self.chunks[index])

    def _of(self, chunk: int) -> Demand:
        """Return the demand as if the model were one segment: enough where nothing streams, else a first guess."""
        if chunk not in self._known:
            self._known[chunk] = self._demand(
                chunk, self._session.scratch_bytes(self._whole, self.shape(chunk)), live_width(self._model.trace)
            )
        return self._known[chunk]

    def shape(self, chunk: int) -> PassShape:
        """Return the largest pass of this chunk: every cache in full view."""
        windows = {layer.group: layer.window for layer in self._model.layers}
        cached = self._kept[0] if self._kept else chunk
        places = (capacity(windows[group], self._context, cached, self._cache) for group in sorted(windows))
        groups = tuple(CacheGroup(n, n) for n in places)
        return PassShape(chunk, min(chunk, self._n_rows), groups, cache=self._cache)

    def measured(self, plan: Plan) -> Demand:
        """Return what the segments that `plan` leads to really need."""
        cut_model = cut(self._model.trace, [run.unit for run in runs(plan)], self.apart)
        shape = self.shape(plan.chunk)
        elsewhere = self.apart if self.spilling else frozenset()
        placed = (placed for placed in cut_model.segments if not elsewhere.intersection(placed.layers))
        distinct = {placed.segment for placed in placed if placed.segment.ops}
        scratch = max(self._session.scratch_bytes(segment, shape) for segment in distinct)
        return self._demand(plan.chunk, scratch, Layout.of(cut_model).width)

    def _demand(self, chunk: int, scratch_bytes: int, width: int) -> Demand:
        model = self._model
        windows = {layer.group: layer.window for layer in model.layers}
        cached, kv_bytes = self._kept or (chunk, cache_bytes(model.layers, self._context, chunk, self._cache))
        filtering, important = self._filtering, self.spilling.n_kept if self.spilling else 0
        if filtering is not None:
            kv_bytes = filtering.kv_bytes(model.layers, self._context, cached, self._cache)
        places = {group: capacity(window, self._context, cached, self._cache) for group, window in windows.items()}
        # several rows of logits are put together from tiles; they are not sampled from, or are as few as the copies
        copies = max(SAMPLING_COPIES, self._max_outputs) + (self._n_rows > 1)
        state = workspace_bytes(width, chunk, self._n_rows, model.n_vocab, model.embedding.row_bytes, places)
        spill, spill_bytes = self.spilling.at(self._context, cached) if self.spilling else (None, 0)
        return Demand(
            process_bytes=self._process_bytes,
            constants_bytes=model.constants.span_bytes,
            kv_bytes=kv_bytes + (self.spilling.kv_bytes(spill) if self.spilling and spill else 0),
            chunk=chunk,
            scratch_bytes=scratch_bytes,
            state_bytes=state,
            reserve_bytes=RESERVE_BYTES
            + self._guesses_bytes
            + GRAPH_BYTES_PER_OP * len(model.trace.ops) // 4 * most_shapes(self._n_rows) // most_shapes(1)
            + copies * model.n_vocab * FLOAT_BYTES,
            kv=_types_of(self._cache) if any(layer.n_kv_heads for layer in model.layers) else "f16",
            draft_bytes=self._draft_bytes,
            n_rows=self._n_rows,
            spill=spill,
            spill_bytes=spill_bytes,
            attention="filtered" if filtering else "important" if important else "exact",
            n_kept=filtering.n_kept if filtering else important,
            places=filtering.places if filtering else 0,
        )


def _types_of(cache: CacheLayout) -> str:
    return ":".join(dict.fromkeys(cache.items))


def live_width(trace: Trace) -> int:
    """Return the largest sum of widths of values alive between two operations."""
    last: dict[int, int] = {}
    for i, op in enumerate(trace.ops):
        for value in op.inputs:
            last[value] = i
    alive: dict[int, int] = {}
    widest = 0
    for i, op in enumerate(trace.ops):
        if op.output in last:
            alive[op.output] = align_up(trace.values[op.output].width, ALIGN // FLOAT_BYTES)
        widest = max(widest, sum(alive.values()))
        for value in op.inputs:
            if last[value] == i:
                alive.pop(value, None)
    return widest


def with_room(demand: Demand, other: Demand) -> Demand:
    """Return `demand` with scratch and state no smaller than those of `other`."""
    return demand._replace(
        scratch_bytes=max(demand.scratch_bytes, other.scratch_bytes),
        state_bytes=max(demand.state_bytes, other.state_bytes),
    )
