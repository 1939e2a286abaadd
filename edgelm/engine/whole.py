"""A model that comes as one graph: plan its memory, own its cache, and feed it ids. Resident only.

The graph is computed by a backend's `GraphSession`, which owns the weights. Imports neither tokenizer nor sampler.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import DTypeLike, NDArray

from edgelm.engine.backend import GraphBuffers, GraphMemory, GraphSession
from edgelm.engine.demand import RESERVE_BYTES, SAMPLING_COPIES
from edgelm.engine.loading import DEFAULT_CONTEXT, Request
from edgelm.engine.passes import check_request, first_width
from edgelm.engine.rows import Rows
from edgelm.errors import BudgetTooSmall, Cancelled, ConfigError
from edgelm.files.graph import GraphModel
from edgelm.memory.arena import is_chain
from edgelm.memory.buffer import Buffer, align_up
from edgelm.memory.plan import Demand, Plan
from edgelm.memory.spill_shape import Traffic
from edgelm.memory.timeline import Times
from edgelm.memory.units import Part, Unit

CHUNKS = (128, 64, 32, 16)
"""Tokens of a prompt pass. No wider: most graphs give the logits of every token, a row of the vocabulary each."""
LEAST_CONTEXT = 512
"""How far a context that nobody asked for is shortened before a budget is refused."""
ALIGN = 64


def plan_whole(model: GraphModel, session: GraphSession, request: Request, process_bytes: int) -> Plan:
    """Return the plan of a whole model: the widest prompt pass that fits, then half the context, and so on.

    Raises `BudgetTooSmall` with the smallest budget that works, `ConfigError` for more context than the model has.
    """
    if request.context is not None and request.context > model.n_context:
        raise ConfigError(f"context {request.context} is more than the {model.n_context} tokens of this graph")
    if request.max_outputs > 1 and (model.sees_last or not model.cache_in_place):
        raise ConfigError("this graph gives the logits of one token at a time only")
    context = request.context or min(model.n_context, DEFAULT_CONTEXT)
    memory = session.memory()
    while True:
        chunks = [n for n in CHUNKS if n <= context] if model.cache_in_place else [1]
        plans = [_plan(model, session, memory, process_bytes, context, chunk) for chunk in chunks or [context]]
        fitting = next((plan for plan in plans if plan.planned_bytes <= request.budget_bytes), None)
        if fitting is not None:
            return replace(fitting, budget_bytes=request.budget_bytes)
        if request.context is not None or context <= LEAST_CONTEXT:
            raise too_small(plans[-1], request.budget_bytes)
        context //= 2


def too_small(plan: Plan, budget_bytes: int) -> BudgetTooSmall:
    """Return the error that says what this plan needs, and for what."""
    weights = ("weights, all resident", plan.pinned_bytes)
    return BudgetTooSmall(budget_bytes, plan.planned_bytes, (*plan.demand.items(), weights))


def _plan(
    model: GraphModel, session: GraphSession, memory: GraphMemory, process_bytes: int, context: int, chunk: int
) -> Plan:
    """Return the plan of these sizes, with just the budget that it needs."""
    kv_bytes, state_bytes = sum(_cache_sizes(model, context)), sum(_state_sizes(model, context, chunk))
    scratch_bytes = session.scratch_bytes(chunk, context)
    # loading is over before caches and activations take their pages
    loading_bytes = memory.peak_bytes - memory.weights_bytes - memory.runtime_bytes
    demand = Demand(
        process_bytes=process_bytes + memory.runtime_bytes,
        constants_bytes=0,
        kv_bytes=kv_bytes,
        chunk=chunk,
        scratch_bytes=max(scratch_bytes, loading_bytes - kv_bytes - state_bytes),
        state_bytes=state_bytes,
        reserve_bytes=RESERVE_BYTES + SAMPLING_COPIES * model.n_vocab * 4,
    )
    n_bytes = memory.weights_bytes
    unit = Unit((Part("the graph's weights", 0, 1, 0, 0, n_bytes, max(n_bytes, 1)),), (), n_bytes, n_bytes)
    plan = Plan(demand.total_bytes + n_bytes, context, demand, (unit,), frozenset([0]), 0, 0)
    return replace(plan, budget_bytes=max(plan.planned_bytes, 1))


def _cache_sizes(model: GraphModel, context: int) -> list[int]:
    """Return the bytes of every cache: key and value of each layer, twice if they do not grow in place."""
    item_bytes = np.dtype(model.cache_type).itemsize
    one = align_up(model.n_kv_heads * context * model.head_dim * item_bytes, ALIGN)
    return [one] * (2 * len(model.layers) * (1 if model.cache_in_place else 2))


def _state_sizes(model: GraphModel, context: int, chunk: int) -> list[int]:
    """Return the bytes of ids, mask, positions, and logits."""
    inputs, rows = model.graph.inputs, 1 if model.sees_last else chunk
    types = inputs[model.ids].type, inputs[model.mask].type, inputs[model.positions or model.mask].type
    counts = chunk, context, context if model.positions else 1
    sizes = [np.dtype(kind).itemsize * n for kind, n in zip(types, counts, strict=True)]
    logits = np.dtype(model.graph.outputs[model.logits].type).itemsize * rows * model.n_vocab
    return [align_up(size, ALIGN) for size in (*sizes, logits)]


class WholeEngine:
    """One model, one conversation: `edgelm.engine.running.Running` for a graph."""

    def __init__(
        self, model: GraphModel, plan: Plan, session: GraphSession, n_threads: int, max_outputs: int = 1
    ) -> None:
        """Take over the session. `load` must be called before the first pass."""
        self.plan, self.n_threads, self.max_outputs = plan, n_threads, max_outputs
        self._loaded = plan
        self.times = Times()
        self.n_vocab, self.bytes_streamed, self.kv_traffic = model.n_vocab, 0, Traffic()
        self._model, self._session = model, session
        self._stop = threading.Event()
        self._n_past = self._side = 0
        self._n_tried = 0  # rows of a verified pass that nobody has kept yet
        self._closed = False
        self._cache: Buffer | None = None
        self._state: Buffer | None = None

    def load(self) -> None:
        """Let the session read the weights, and allocate what the plan says beside them."""
        self._session.load()
        model, context = self._model, self.plan.context
        sizes = _cache_sizes(model, context)
        self._cache = Buffer(sum(sizes), huge=False)
        at = [self._cache.address + i * sizes[0] for i in range(len(sizes))]
        pairs = tuple(zip(at[::2], at[1::2], strict=True))
        n_layers = len(model.layers)
        self._sets = tuple(pairs[i : i + n_layers] for i in range(0, len(pairs), n_layers))
        ids, mask, positions, logits = _state_sizes(model, context, self.plan.chunk)
        self._state = Buffer(ids + mask + positions + logits, huge=False)
        inputs, rows = model.graph.inputs, 1 if model.sees_last else self.plan.chunk
        self._ids = self._array(inputs[model.ids].type, self.plan.chunk, 0)
        self._array(inputs[model.mask].type, context, ids)[:] = 1
        if model.positions is not None:
            kind = inputs[model.positions].type
            self._array(kind, context, ids + mask)[:] = np.arange(context, dtype=kind)
        kind = model.graph.outputs[model.logits].type
        self._logits = self._array(kind, rows * self.n_vocab, ids + mask + positions).reshape(rows, self.n_vocab)
        base = self._state.address
        places = (base, base + ids, base + ids + mask, base + ids + mask + positions)
        self._session.bind(GraphBuffers(*places, self._sets, context))

    def _array(self, kind: DTypeLike, n_items: int, start: int) -> NDArray[np.generic]:
        assert self._state is not None
        return np.frombuffer(self._state.view, kind, n_items, start)

    @property
    def n_past(self) -> int:
        """Positions stored in the cache."""
        return self._n_past - self._n_tried

    def cancel(self, on: bool = True) -> None:
        """Break off the running pass (it raises `Cancelled`), from any thread; `on=False` allows passes again."""
        if on:
            self._stop.set()
        else:
            self._stop.clear()
        self._session.abort(on)

    def forward(
        self, ids: Sequence[int], n_outputs: int = 1, progress: Callable[[int], None] | None = None
    ) -> NDArray[np.float32]:
        """Append `ids` to the cache; return the logits [n_outputs, n_vocab] of the last positions.

        See `Engine.forward`, whose passes these are; the result is valid until the next call.
        """
        if self._closed:
            raise Cancelled("the model was closed")
        self._forget_tried()
        check_request(self, ids, n_outputs, self.max_outputs, self.n_vocab)
        done = 0
        while (n_tokens := self._width(len(ids), done, n_outputs)) < len(ids) - done:
            self._pass(ids[done : done + n_tokens])
            done += n_tokens
            if progress is not None:
                progress(done)
        self._pass(ids[done:])
        rows = (
            self._logits[:1] if self._model.sees_last else self._logits[len(ids) - done - n_outputs : len(ids) - done]
        )
        return rows.astype(np.float32, copy=False)

    trees = False

    @property
    def max_rows(self) -> int:
        """Rows of logits that one pass can return: all of a pass, unless the graph makes those of the last one."""
        return 1 if self._model.sees_last else self.plan.chunk

    def verify(self, ids: Sequence[int], parents: Sequence[int]) -> Rows:
        """Compute a pass over a chain of drafted ids; see `Running.verify`."""
        assert is_chain(parents), "the passes of a graph do not branch"
        if self._closed:
            raise Cancelled("the model was closed")
        self._forget_tried()
        check_request(self, ids, len(ids), self.max_rows, self.n_vocab)
        self._pass(ids)
        self._n_tried = len(ids)
        return Rows([self._logits[: len(ids)]])  # single rows become float32: there is no room for a copy of all

    def keep(self, rows: Sequence[int]) -> None:
        """Store the first rows of the last verified pass."""
        n_past = self._n_past - self._n_tried + len(rows)
        self._n_tried = 0
        self.truncate(n_past)

    def _forget_tried(self) -> None:
        if self._n_tried:  # nobody kept them
            self.keep(())

    def _width(self, n: int, done: int, n_outputs: int) -> int:
        return first_width(n, done, self.plan.chunk, n_outputs) if self.plan.chunk > 1 else 1

    def _pass(self, ids: Sequence[int]) -> None:
        if self._stop.is_set():
            raise Cancelled("the generation was stopped")
        n_tokens = len(ids)
        self._ids[:n_tokens] = ids
        began_s = time.perf_counter()
        self._session.run(n_tokens, self._n_past, self._side)
        self.times.add("compute", 0, began_s)
        self._n_past += n_tokens
        self._side = (self._side + 1) % len(self._sets)

    def truncate(self, n_past: int) -> int:
        """Forget positions from `n_past` on; return how many are kept."""
        self._forget_tried()
        n_past = min(n_past, self._n_past)
        if n_past < self._n_past and not self._model.cache_in_place:
            self._shorten(n_past)
        self._n_past = n_past
        return n_past

    def _shorten(self, n_past: int) -> None:
        """Move the heads of dense caches together: each one's first `n_past` positions stay."""
        model, kind = self._model, self._model.cache_type
        assert self._cache is not None
        n_items = model.n_kv_heads * self._n_past * model.head_dim
        for address in (address for pair in self._sets[self._side] for address in pair):
            flat = np.frombuffer(self._cache.view, kind, n_items, address - self._cache.address)
            heads = flat.reshape(model.n_kv_heads, self._n_past, model.head_dim)
            kept = heads[:, :n_past].copy()
            flat[: kept.size] = kept.reshape(-1)

    def carry_out(self, plan: Plan) -> None:
        """Go over to a plan of another budget: nothing moves, all of it stays resident."""
        self.plan = plan

    def replan(self, budget_bytes: int, more_bytes: int = 0) -> Plan:
        """Return the plan of another budget, with `more_bytes` in memory that were not when the model was loaded.

        Raises `BudgetTooSmall` if what is loaded does not fit in it.
        """
        demand = self._loaded.demand
        plan = replace(
            self._loaded,
            budget_bytes=max(budget_bytes, self._loaded.planned_bytes + more_bytes),
            demand=demand._replace(process_bytes=demand.process_bytes + more_bytes),
        )
        if budget_bytes < plan.planned_bytes:
            raise too_small(plan, budget_bytes)
        return replace(plan, budget_bytes=budget_bytes)

    def close(self) -> None:
        """Give all memory back. Safe to call twice."""
        if self._closed:
            return
        self._closed = True
        self._session.close()
        for name in ("_ids", "_logits"):
            self.__dict__.pop(name, None)
        for buffer in (self._cache, self._state):
            if buffer is not None:
                buffer.release()
