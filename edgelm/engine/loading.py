"""From a file and a budget to an engine: record, plan, allocate, read. Text and callers live elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from edgelm.engine.architecture import record
from edgelm.engine.backend import Adopting, Backend, CacheLayout, Session, WeightLayout, layout_of
from edgelm.engine.cache_types import layouts_for
from edgelm.engine.demand import Demands, Model, describe, with_room
from edgelm.engine.drafted_rows import most_rows
from edgelm.engine.filtered import FilteredEngine
from edgelm.engine.filtering import Filtering, filtering_of
from edgelm.engine.forward import Engine
from edgelm.engine.important import ImportantEngine
from edgelm.engine.registry import get_architecture
from edgelm.engine.spilling import Spilling, bounded_of, open_spilled, spilling_of
from edgelm.errors import BudgetTooSmall, ConfigError, UnsupportedModel
from edgelm.files.index import is_folder, is_genai_folder, open_indexed
from edgelm.files.meta import Meta
from edgelm.files.model import ModelFile
from edgelm.memory.arena import KVArena, LayerCache
from edgelm.memory.pinned import PinnedWeights
from edgelm.memory.plan import Demand, Plan, least_weights, make_plan
from edgelm.memory.predict import Rates
from edgelm.memory.stores import Store
from edgelm.memory.timeline import Times

if TYPE_CHECKING:
    from edgelm.memory.flash import ReadPattern

DEFAULT_CONTEXT = 4096
MIN_CONTEXT = 16
MAX_OUTPUTS = 64
"""Rows of logits of one pass: a row of the largest vocabularies takes a megabyte."""
_ROUNDS = 6


@dataclass(frozen=True, slots=True)
class Request:
    """What the caller asked for. `context` None: as much as the model was made for, at most `DEFAULT_CONTEXT`."""

    budget_bytes: int
    context: int | None = None
    n_threads: int = 1
    max_outputs: int = 1
    speculate: bool = True
    kv: str = "f16"
    """Types of keys and values: `edgelm.engine.cache_types`."""
    draft_bytes: int = 0
    """What a draft model takes of the budget."""
    spill: bool = True
    parallel: int = 1
    """Answers side by side that there is to be room for."""
    attention: str = "exact"
    kept: float = 1.0
    """What approximates attention, if anything, and the share of the context that it keeps."""

    def __post_init__(self) -> None:
        if self.context is not None and self.context < MIN_CONTEXT:
            raise ConfigError(f"context must be at least {MIN_CONTEXT} tokens, got {self.context}")
        most = min(MAX_OUTPUTS, self.context or MIN_CONTEXT)
        if not 1 <= self.max_outputs <= most:
            raise ConfigError(f"max_outputs must be between 1 and {most} rows of logits, got {self.max_outputs}")
        if not 1 <= self.parallel <= most:
            raise ConfigError(f"parallel must be between 1 and {most} answers, got {self.parallel}")


class Prepared(NamedTuple):
    """A plan, and all that is needed to carry it out."""

    model: Model
    plan: Plan
    session: Session
    request: Request
    file: ModelFile
    process_bytes: int
    rates: Rates | None
    pattern: ReadPattern | None
    streams: bool
    cache: CacheLayout
    cache_chunk: int = 0
    """What passes the cache is made for, if not for those of the plan."""
    spilling: Spilling | None = None
    """What of the cache goes to flash where it does not fit."""
    filtering: Filtering | None = None
    """How long prompts are made shorter, if that is asked for."""
    prompts: Prepared | None = None
    """The backend that computes the prompts, if another one does: `edgelm.engine.phases`."""


def open_path(path: str | PathLike[str]) -> ModelFile:
    """Return the header of a GGUF file, a pack or a model folder. Raises what opening one of them raises."""
    if is_genai_folder(path):
        from edgelm.engine.graphs import open_genai

        return open_genai(Path(path))[0]
    if not is_folder(path):
        return open_indexed(path)
    from edgelm.engine.folders import open_folder

    return open_folder(Path(path))


def computable(file: ModelFile, backend: Backend) -> tuple[ModelFile, tuple[str, ...], tuple[str, ...]]:
    """Return the file with types that the backend does not have as others, if that can be.

    With it a sentence on each type that is converted, and on what is lost.
    """
    if not file.derived:
        return file, (), ()
    from edgelm.engine.folders import converted

    return converted(file, backend.capabilities().types)


def layout_for(file: ModelFile, backend: Backend) -> WeightLayout | None:
    """Return the layout that a computable file is to be prepared in; None if the backend takes it as it is."""
    layout = layout_of(backend)
    if layout is not None or not any(how.how == "ggml" for how in file.derived.values()):
        return layout
    from edgelm.engine.folders import GgmlLayout

    return GgmlLayout(file)


def prepare(
    file: ModelFile,
    backend: Backend,
    session: Session,
    request: Request,
    process_bytes: int,
    rates: Rates | None,
    pattern: ReadPattern | None = None,
) -> Prepared:
    """Record the model and plan its memory; reads no weights.

    Raises `UnsupportedModel` for a model that edgelm or the backend cannot run, `BudgetTooSmall` with the smallest
    budget that works. If the caller left the context open it is halved, down to 512, before the budget is refused.
    Of several types that keys and values may have, the first is taken with which nothing has to be given up.
    """
    rest = (file, backend, session, request, process_bytes, rates, pattern)
    return of_some_types(file, backend, request, partial(_prepare, *rest))


def of_some_types(
    file: ModelFile, backend: Backend, request: Request, prepare_with: Callable[[CacheLayout], Prepared]
) -> Prepared:
    """Return what `prepare_with` makes of the first types of keys and values with which nothing has to be given up.

    Raises `BudgetTooSmall` if none fits, with the smallest budget that works.
    """
    context = request.context or default_context(file)

    def layers() -> tuple[LayerCache, ...]:
        trace = record(get_architecture(file.architecture), file, context)
        return describe(trace, file.tensors, file.gathered).layers

    def given_up(one: Prepared) -> tuple[bool, int, bool]:
        # where weights are streamed anyway, 8 bits are worth what they cost; what goes to flash is f16
        usual = ("f16", "f16") if one.spilling else ("q8_0", "q8_0")
        return one.spilling is not None, -one.plan.context, one.cache.items != usual

    found: list[Prepared] = []
    refused: list[BudgetTooSmall] = []
    for cache in layouts_for(request.kv, backend, layers):
        try:
            prepared = prepare_with(cache._replace(windows=request.parallel))
        except BudgetTooSmall as exc:
            refused.append(exc)
            continue
        plan = prepared.plan
        streamed = plan.streamed or (plan.prompts is not None and plan.prompts.streamed)
        if not streamed and prepared.spilling is None and plan.context == context:
            return prepared
        found.append(prepared)
    if not found:
        raise min(refused, key=lambda exc: exc.needed_bytes)
    return min(found, key=given_up)


def _prepare(
    file: ModelFile,
    backend: Backend,
    session: Session,
    request: Request,
    process_bytes: int,
    rates: Rates | None,
    pattern: ReadPattern | None,
    cache: CacheLayout,
) -> Prepared:
    architecture = get_architecture(file.architecture)
    context = request.context or default_context(file)
    can = backend.capabilities()
    while True:
        model = describe(record(architecture, file, context), file.tensors, file.gathered)
        check_types(model, backend)
        terms = Terms(context, rates, can.streams, isinstance(session, Adopting))
        rest = (session, context, process_bytes, request.max_outputs, cache)
        filtering = filtering_of(model, context, request.kept) if request.attention == "filtered" else None
        demands = partial(Demands, draft_bytes=request.draft_bytes, filtering=filtering)
        common = (session, request, file, process_bytes, rates, pattern, can.streams, cache)
        try:
            bounded: Spilling | None = None
            if request.attention == "important":
                model, bounded = bounded_of(model, context, request.kept, request.n_threads)
            with_all = partial(demands, model, *rest, spilling=bounded)
            plan = with_rows(model, with_all, request, request.budget_bytes, terms)
            return Prepared(model, plan, *common, filtering=filtering, spilling=bounded)
        except BudgetTooSmall as refused:
            if request.context is None and context > 512:
                context //= 2
                continue
            spills = request.spill and request.context and request.parallel == 1 and request.attention == "exact"
            found = spilling_of(model, request.n_threads) if spills else None
            if found is None:
                raise
            model, spilling = found
            try:
                plan, spilling = _settle_spilled(model, partial(demands, model, *rest), spilling, request, terms)
            except BudgetTooSmall as exc:
                raise min(exc, refused, key=lambda error: error.needed_bytes) from None
            return Prepared(model, plan, *common, spilling=spilling)


def _settle_spilled(
    model: Model, demands: Callable[..., Demands], spilling: Spilling, request: Request, terms: Terms
) -> tuple[Plan, Spilling]:
    """Plan with a cache that spills, and say how: weights first, and what they leave to keys and values.

    Weights are read for every token, keys and values only once the context is full.
    """

    def plan_with(extra: int) -> Plan:
        with_extra = partial(demands, spilling=spilling._replace(extra=extra))
        return with_rows(model, with_extra, request, request.budget_bytes, terms)

    plan = plan_with(0)
    shape = plan.demand.spill
    assert shape is not None
    room = 0 if plan.streamed else request.budget_bytes - plan.planned_bytes
    for extra in range(min(room // shape.step_bytes, shape.n_spilled), 0, -1):
        roomier = plan_with(extra)
        if not roomier.streamed and roomier.chunk == plan.chunk:
            return roomier, spilling._replace(extra=extra)
    return plan, spilling


def build(
    prepared: Prepared,
    store: Store,
    loader: Store | None = None,
    progress: Callable[[int, int], None] | None = None,
    cancelled: Callable[[], bool] | None = None,
    *,
    arena: KVArena | None = None,
    beside: Callable[[Store], Store] | None = None,
    make: Callable[..., Engine] = Engine,
) -> Engine:
    """Allocate what the plan says and read the pinned weights. The engine owns `store` and the session from here.

    `arena`: a cache that exists already, which it then owns, too. `beside`: see `open_spilled`. `make` makes the
    engine.
    """
    model, plan, request = prepared.model, prepared.plan, prepared.request
    pinned, spilled = PinnedWeights(prepared.file.file_bytes), None
    try:
        arena = arena or KVArena(model.layers, plan.places, plan.chunk, prepared.cache)
        session, n_threads, outputs = prepared.session, request.n_threads, request.max_outputs
        if prepared.spilling is not None:
            times = Times()
            spilled = open_spilled(prepared.spilling, plan, session, times, beside)
            make = partial(ImportantEngine if prepared.spilling.n_kept else make, times=times, spilled=spilled)
        if prepared.filtering is not None:
            make = partial(FilteredEngine, filtering=prepared.filtering)
        engine = make(model, plan, pinned, arena, store, session, n_threads, outputs, prepared.pattern)
        engine.load(loader, progress, cancelled)
    except BaseException:
        pinned.close()
        if arena is not None:
            arena.close()
        if spilled is not None:
            spilled.close()
        raise
    return engine


def replan(prepared: Prepared, engine: Engine, budget_bytes: int) -> Plan:
    """Return the plan of another budget for a running engine: its cache stays as it is.

    Raises `BudgetTooSmall` with the smallest budget that works now.
    """
    model, request, arena, context = prepared.model, prepared.request, engine.arena, engine.plan.context
    demands = partial(
        Demands, model, prepared.session, context, prepared.process_bytes, request.max_outputs, arena.layout,
        kept=(arena.chunk, arena.n_bytes), draft_bytes=request.draft_bytes, spilling=prepared.spilling,
        filtering=prepared.filtering,
    )  # fmt: skip
    terms = Terms(context, prepared.rates, prepared.streams, isinstance(prepared.session, Adopting))
    return with_rows(model, demands, request, budget_bytes, terms)


class Terms(NamedTuple):
    """What a plan is made under besides the budget; see `make_plan`."""

    context: int
    rates: Rates | None
    streams: bool
    adopts: bool


def with_rows(model: Model, demands: Callable[..., Demands], request: Request, budget_bytes: int, terms: Terms) -> Plan:
    """Return the plan with as many rows for drafts as are worth their memory; `settle` says what it raises."""
    if model.encodes:
        return settle(model, demands(), budget_bytes, terms)

    def plan_with(n_rows: int) -> Plan | None:
        found = demands(n_rows=n_rows)
        return settle(model, found, budget_bytes, terms) if found.chunks else None

    return most_rows(plan_with, request, model.n_vocab, terms.context)


def settle(model: Model, demands: Demands, budget_bytes: int, terms: Terms) -> Plan:
    """Plan with guessed demands, then again with what the segments that come of it really need.

    Where that fails, the smallest slots are tried, chunk by chunk: that is the floor that an error names.
    """
    chunks = range(len(demands) - 1, len(demands))
    try:
        plan = make_plan(model.matrices, demands, budget_bytes, *terms)
        if not plan.streamed and not plan.adopts and not demands.apart:  # one segment, as was guessed
            return plan
        measured = demands.measured(plan)
        needed = measured if plan.streamed else with_room(plan.demand, measured)
        agreed = agreed_plan(model, demands, needed, budget_bytes, terms)
        if agreed is not None:
            return agreed
        chunks = range(demands.chunks.index(plan.chunk), len(demands))
    except BudgetTooSmall:
        if not terms.streams and not terms.adopts:
            raise
    for i in chunks:
        least = least_plan(model, demands, i, terms)
        if least.planned_bytes <= budget_bytes:
            roomy = agreed_plan(model, demands, least.demand, budget_bytes, terms)
            return roomy or replace(least, budget_bytes=budget_bytes)
    weights = ("slots for streaming", least.slots_bytes) if least.streamed else ("weights", least.pinned_bytes)
    raise BudgetTooSmall(budget_bytes, least.planned_bytes, (*least.demand.items(), weights))


def least_plan(model: Model, demands: Demands, chunk: int, terms: Terms) -> Plan:
    """Return the plan of the smallest budget that works with prompt passes of `demands.chunks[chunk]` tokens."""
    _, weights_bytes = least_weights(model.matrices, terms.streams, terms.adopts)
    demand = demands[chunk]
    plan = make_plan(model.matrices, [demand], demand.total_bytes + weights_bytes, *terms)
    if plan.streamed or plan.adopts or demands.apart:
        demand = demands.measured(plan)
        plan = make_plan(model.matrices, [demand], demand.total_bytes + weights_bytes, *terms)
    return replace(plan, budget_bytes=plan.planned_bytes)


def agreed_plan(model: Model, demands: Demands, needed: Demand, budget_bytes: int, terms: Terms) -> Plan | None:
    """Plan, look at the segments, and plan with what they need, until the two agree; None if they never do."""
    for _ in range(_ROUNDS):
        try:
            plan = make_plan(model.matrices, [needed], budget_bytes, *terms)
        except BudgetTooSmall:
            return None
        grown = with_room(needed, demands.measured(plan))
        if grown == needed:
            return plan
        needed = grown
    return None


def default_context(file: ModelFile) -> int:
    """Return the context of a caller who asks for none: what the model was made for, within reason."""
    return min(Meta.of(file).int("context_length", default=DEFAULT_CONTEXT, least=1), DEFAULT_CONTEXT)


def check_types(model: Model, backend: Backend) -> None:
    supported = backend.capabilities().types
    for info in (model.embedding, *model.matrices):
        if info.type not in supported:
            raise UnsupportedModel(
                f"tensor {info.name!r} is of type {info.type.name}, which the {backend.name} backend does not compute; "
                "try another quantization or another backend"
            )
