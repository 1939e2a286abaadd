"""Two backends for one conversation: one fills the cache with prompts, the other answers from it.

An NPU is fast at wide passes and slow at single tokens, so prompts are its part (llm.npu, arXiv:2407.05858). Of a
pass it only needs what fills the cache: neither the end of the last block nor the output head. Weights in both layouts
count against the budget; the answers' stay first, the prompts' take what is left and stream the rest at each prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from edgelm.engine import demand
from edgelm.engine.architecture import record
from edgelm.engine.backend import Adopting, Backend, CacheLayout, Session
from edgelm.engine.cache_types import layout_like
from edgelm.engine.demand import Demands, Model, describe
from edgelm.engine.drafted_rows import most_rows
from edgelm.engine.forward import Engine
from edgelm.engine.ir import Op, Trace, Value
from edgelm.engine.loading import (
    Prepared,
    Request,
    Terms,
    agreed_plan,
    check_types,
    default_context,
    least_plan,
    of_some_types,
    settle,
)
from edgelm.engine.loading import build as build_one
from edgelm.engine.loading import prepare as prepare_one
from edgelm.engine.loading import replan as replan_one
from edgelm.engine.phased import LEAST_PROMPT, PhasedEngine
from edgelm.engine.registry import get_architecture
from edgelm.errors import BudgetTooSmall, UnsupportedModel
from edgelm.files.model import ModelFile
from edgelm.memory.arena import KVArena, cache_bytes
from edgelm.memory.plan import MAX_SLOT_BYTES, N_SLOTS, Demand, Plan, job_s, make_plan
from edgelm.memory.predict import Rates
from edgelm.memory.stores import Store

if TYPE_CHECKING:
    from edgelm.memory.flash import ReadPattern

LARGE_BYTES = 1 << 50


class Phase(NamedTuple):
    """A backend, and the model as it wants it."""

    file: ModelFile
    backend: Backend
    session: Session
    rates: Rates | None
    pattern: ReadPattern | None = None


class Sources(NamedTuple):
    """Where weights are read from: while the model runs, and when it is loaded (None: the same).

    `beside`: how other files are read on a device that is simulated (None: as they are).
    """

    store: Store
    loader: Store | None = None
    beside: Callable[[Store], Store] | None = None


def until_cached(trace: Trace) -> Trace:
    """Return the part of a pass that fills the cache, up to the last attention; its output is of no use."""
    if not trace.attends:
        raise UnsupportedModel("a model that embeds texts has no answers apart from prompts; use one backend for all")
    last = max(i for i, op in enumerate(trace.ops) if op.kind == "attend")
    attended, end = trace.ops[last].output, max(trace.values) + 1
    values = {**trace.values, end: Value(trace.values[attended].width, "output")}
    return Trace((*trace.ops[: last + 1], Op("select", (attended,), end)), values, end)


def prepare(answers: Phase, request: Request, process_bytes: int, prompts: Phase | None = None) -> Prepared:
    """Record the model and plan its memory, as `loading.prepare` does, with a backend of their own for the prompts."""
    if prompts is None:
        return prepare_one(*answers[:3], request, process_bytes, *answers[3:])

    def prepare_with(cache: CacheLayout) -> Prepared:
        context = request.context or default_context(answers.file)
        while True:
            try:
                return _prepare_at(answers, prompts, request, process_bytes, context, cache)
            except BudgetTooSmall:
                if request.context is not None or context <= 512:
                    raise
                context //= 2

    return of_some_types(answers.file, answers.backend, request, prepare_with)


def _prepare_at(
    answers: Phase, prompts: Phase, request: Request, process_bytes: int, context: int, cache: CacheLayout
) -> Prepared:
    """`cache`: that of the answers; the prompts' is of the same types if their backend has them."""
    architecture, parts = get_architecture(answers.file.architecture), []
    for phase in (answers, prompts):
        trace, can = record(architecture, phase.file, context), phase.backend.capabilities()
        trace = trace if phase is answers else until_cached(trace)
        model = describe(trace, phase.file.tensors, phase.file.gathered)
        check_types(model, phase.backend)
        own = cache if phase is answers else layout_like(can, cache.items)._replace(windows=cache.windows)
        parts.append(_Part(model, phase.session, own, phase.rates, can.streams))
    widest = next((chunk for chunk in demand.CHUNKS if chunk <= context), demand.CHUNKS[-1])
    plan = _planned(parts[0], parts[1], context, widest, process_bytes, request, request.budget_bytes)
    assert plan.prompts is not None
    first, second = (
        Prepared(
            part.model, one, part.session, request, phase.file, process_bytes, phase.rates, phase.pattern,
            part.streams, part.cache, cache_chunk=widest,
        )
        for part, one, phase in zip(parts, (plan, plan.prompts), (answers, prompts), strict=True)
    )  # fmt: skip
    return first._replace(prompts=second)


def replan(prepared: Prepared, engine: Engine, budget_bytes: int) -> Plan:
    """Return the plan of another budget for a running engine, as `loading.replan` does."""
    if prepared.prompts is None:
        return replan_one(prepared, engine, budget_bytes)
    answers, prompts = (
        _Part(one.model, one.session, one.cache, one.rates, one.streams) for one in (prepared, prepared.prompts)
    )
    arena, request = engine.arena, prepared.request
    return _planned(answers, prompts, arena.context, arena.chunk, prepared.process_bytes, request, budget_bytes)


def build(
    prepared: Prepared,
    sources: Sequence[Sources],
    progress: Callable[[int, int], None] | None = None,
    cancelled: Callable[[], bool] | None = None,
) -> Engine:
    """Allocate what the plan says and read the pinned weights, as `loading.build` does.

    `sources`: of the answers, and of the prompts if another backend computes them. The two share one cache if both want
    it alike; else each has its own, and what one stores is handed over.
    """
    before = prepared.prompts
    if before is None:
        store, loader, beside = sources[0]
        return build_one(prepared, store, loader, progress, cancelled, beside=beside)
    arena = KVArena(prepared.model.layers, prepared.plan.context, prepared.cache_chunk, prepared.cache)
    own = arena
    if before.cache != prepared.cache:
        own = KVArena(before.model.layers, before.plan.context, before.cache_chunk, before.cache)
    first = build_one(before, *sources[1][:2], progress, cancelled, arena=own)
    try:
        return build_one(
            prepared, *sources[0][:2], progress, cancelled, arena=arena, make=partial(PhasedEngine, prompts=first)
        )
    except BaseException:
        first.close()
        raise


class _Part(NamedTuple):
    """What planning must know of a backend."""

    model: Model
    session: Session
    cache: CacheLayout
    rates: Rates | None
    streams: bool

    def terms(self, context: int) -> Terms:
        return Terms(context, self.rates, self.streams, isinstance(self.session, Adopting))

    def cache_bytes(self, context: int, chunk: int) -> int:
        return cache_bytes(self.model.layers, context, chunk, self.cache)


def _planned(
    answers: _Part,
    prompts: _Part,
    context: int,
    chunk: int,
    process_bytes: int,
    request: Request,
    budget_bytes: int,
) -> Plan:
    """Return the plan of both, with as many rows for drafts as are worth their memory."""

    def plan_with(n_rows: int) -> Plan | None:
        both = _Both(answers, prompts, context, chunk, process_bytes, request.max_outputs, n_rows)
        return both.plan(budget_bytes) if both.can_answer else None

    return most_rows(plan_with, request, answers.model.n_vocab, context)


class _Both:
    """Plans for two backends that share a budget. The cache is made for passes of `chunk` tokens."""

    def __init__(
        self,
        answers: _Part,
        prompts: _Part,
        context: int,
        chunk: int,
        process_bytes: int,
        max_outputs: int,
        n_rows: int,
    ) -> None:
        self._answers, self._prompts, self._rates = answers, prompts, answers.rates
        own_cache = 0 if prompts.cache == answers.cache else prompts.cache_bytes(context, chunk)
        self._terms = answers.terms(context), prompts.terms(context)
        self._answering = Demands(
            answers.model, answers.session, context, process_bytes, max_outputs, answers.cache,
            (chunk, answers.cache_bytes(context, chunk)), max(LEAST_PROMPT + max_outputs, n_rows), n_rows,
        )  # fmt: skip
        self.can_answer = bool(self._answering.chunks)
        self._prompting = Demands(prompts.model, prompts.session, context, 0, 1, prompts.cache, (chunk, own_cache))

    def plan(self, budget_bytes: int) -> Plan:
        """Return the plan that answers soonest, prompt and answer together.

        Raises `BudgetTooSmall` with the smallest budget that works.
        """
        plans: list[Plan] = []
        for i in range(len(self._prompting)):
            for reserved, needed in self._reserved(i):
                try:
                    plan = self._with(needed, reserved, budget_bytes)
                except BudgetTooSmall as error:
                    refused = error
                    continue
                plans.append(plan)
                assert plan.prompts is not None
                if self._rates is None or not (plan.streamed or plan.prompts.streamed):
                    return plan
        if plans:
            return min(plans, key=job_s)
        items = (*refused.items, ("prompts on another backend", reserved))
        raise BudgetTooSmall(budget_bytes, refused.needed_bytes + reserved, items)

    def _reserved(self, i: int) -> Iterator[tuple[int, Demand]]:
        """Yield what may be left to the prompts in passes of `chunks[i]` tokens, from all weights to the least."""
        model, terms = self._prompts.model, self._terms[1]
        whole = self._prompting[i]
        yield make_plan(model.matrices, [whole], LARGE_BYTES, *terms).planned_bytes, whole
        least = least_plan(model, self._prompting, i, terms)
        if least.streamed:
            yield least.planned_bytes + N_SLOTS * MAX_SLOT_BYTES, least.demand
            yield least.planned_bytes, least.demand

    def _with(self, needed: Demand, reserved: int, budget_bytes: int) -> Plan:
        """Plan the answers with `reserved` bytes left out, then the prompts with what the answers leave."""
        answers = settle(self._answers.model, self._answering, budget_bytes - reserved, self._terms[0])
        left, model, terms = budget_bytes - answers.planned_bytes, self._prompts.model, self._terms[1]
        prompts = make_plan(model.matrices, [needed], left, *terms)
        if prompts.streamed or prompts.adopts:  # else it is one segment, as was guessed
            prompts = agreed_plan(model, self._prompting, needed, left, terms) or prompts
        both = answers.demand._replace(beside_bytes=prompts.planned_bytes)
        return replace(answers, budget_bytes=budget_bytes, demand=both, prompts=prompts)
