"""From a path and a budget to a running engine, with everything that is decided on the way: backend, threads, budget.

The order matters: what stays in the process is loaded first and measured, then memory is planned, then weights come.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from edgelm.approximate import guesses, kept_share
from edgelm.concessions import concessions, old_tables
from edgelm.engine.backend import Backend, Session
from edgelm.engine.calibration import measured_rates
from edgelm.engine.choosing import Asked, choose, split_name
from edgelm.engine.health import open_session
from edgelm.engine.loading import Prepared, Request, computable, default_context, layout_for, open_path
from edgelm.engine.phases import Phase, Sources, build, prepare
from edgelm.engine.running import Running
from edgelm.engine.wishes import Wishes
from edgelm.errors import (
    BackendUnavailable,
    BudgetTooSmall,
    ConfigError,
    EdgeLMError,
    PreparationError,
    UnsupportedModel,
)
from edgelm.files.index import is_folder, is_genai_folder
from edgelm.files.model import ModelFile
from edgelm.memory.derived import derived, derived_loader
from edgelm.memory.meter import Meter
from edgelm.memory.plan import Plan
from edgelm.memory.platform import current_platform
from edgelm.memory.platform.allocator import trim, tune_allocator
from edgelm.memory.stores import Store, ThrottledStore, open_store
from edgelm.memory.verified import verified
from edgelm.replanning import Replanning, flash_pattern, may_stream
from edgelm.resources import budget_of, device_of, published_rates, threads_of
from edgelm.simulated import Device
from edgelm.sizes import MB, human
from edgelm.text.tokenizer import Tokenizer, load_tokenizer

if TYPE_CHECKING:
    from edgelm.drafting import Draft
    from edgelm.engine.forward import Engine

TEMPLATE_BYTES = 6_500_000
"""The template engine, which is imported when the first chat is rendered."""
MEASURING_BYTES = 100 * MB
"""Memory that measuring the device may take where the budget has it: weights must not fit into a cache."""
SPARE_BYTES = 8 * MB
"""What measuring leaves of the budget."""


class Opened(NamedTuple):
    """A loaded model and what was decided: `notes` are sentences for the user, `file` is the model's own.

    `lost` says what converting the weights for the backend loses, a sentence each.
    """

    file: ModelFile
    tokenizer: Tokenizer
    engine: Running
    replan: Callable[[int, int], tuple[Plan, tuple[str, ...]]]
    """Another budget, and bytes that were not in memory when the model was loaded -> its plan, and the notes on it.

    Raises `BudgetTooSmall`; carries nothing out.
    """
    backend: str
    notes: tuple[str, ...]
    lost: tuple[str, ...]
    speculate: bool = True
    """Whether tokens are guessed and verified, where that is faster."""
    draft: Engine | None = None
    """A smaller model that guesses."""
    embeds: bool = False
    """Whether the model turns texts into vectors instead of writing on."""


class _Making(NamedTuple):
    """Who hears of the work if a model has to be prepared for the backend."""

    progress: Callable[[int, int], None] | None
    notice: Callable[[str], None] | None


class Ready(NamedTuple):
    """All but the weights."""

    file: ModelFile
    tokenizer: Tokenizer
    backend: str
    parts: tuple[Part, ...]
    """The backend of the answers, and that of the prompts if they have one of their own."""
    prepared: Prepared
    notes: tuple[str, ...]
    draft: Draft | None = None

    @property
    def lost(self) -> tuple[str, ...]:
        """What converting the weights loses, a sentence each."""
        return tuple(sentence for part in self.parts for sentence in part.lost)

    def close(self) -> None:
        for part in self.parts:
            part.close()
        if self.draft is not None:
            self.draft.part.close()


class Part(NamedTuple):
    """One backend, opened: `told` are sentences for the user, `lost` those of them on what converting loses."""

    phase: Phase
    store: Store
    told: tuple[str, ...]
    lost: tuple[str, ...]

    def sources(self) -> tuple[Sources, Store]:
        """Return where weights are read from, checked, and what must be closed when they are loaded."""
        file = self.phase.file
        loader = derived_loader([str(part) for part in file.paths], self.store, file)
        beside = self.store.beside if isinstance(self.store, ThrottledStore) else None
        return Sources(verified(self.store, file), verified(loader, file, again=self.store), beside), loader

    def close(self) -> None:
        self.phase.session.close()
        self.store.close()


def open_engine(
    path: str | PathLike[str],
    wishes: Wishes,
    progress: Callable[[int, int], None] | None = None,
    notice: Callable[[str], None] | None = None,
) -> Opened:
    """Load a model inside a budget; see `edgelm.load`."""
    if is_genai_folder(path):
        from edgelm.opening_graph import open_graph

        return open_graph(Path(path), wishes, progress)
    making = _Making(progress, notice)
    ready = get_ready(path, wishes, making)
    try:
        sources, loaders = zip(*(part.sources() for part in ready.parts), strict=True)
        engine = build(ready.prepared, sources, progress)
        for loader, part in zip(loaders, ready.parts, strict=True):
            if loader is not part.store:
                loader.close()
    except BaseException:
        ready.close()
        raise
    draft = None
    try:
        if ready.draft is not None:
            draft = ready.draft.build()
    except BaseException:
        engine.close()
        raise
    notes = (*ready.notes, *concessions(ready.prepared.plan, wishes.context or default_context(ready.file)))
    notes += old_tables(ready.file)
    replanned = Replanning(ready.prepared, engine)
    embeds = ready.prepared.model.encodes
    speculate = guesses(wishes) and not embeds
    facts = (ready.file, ready.tokenizer, engine, replanned, ready.backend, notes, ready.lost)
    return Opened(*facts, speculate, draft, embeds)


def plan(
    path: str | PathLike[str],
    *,
    memory: str | int | None = None,
    backend: str = "auto",
    threads: int | None = None,
    context: int | None = None,
    simulate: str | None = None,
    speculate: bool = True,
    draft: str | PathLike[str] | None = None,
    spill: bool = True,
    kv: str = "f16",
    parallel: int = 1,
    attention: str = "exact",
    kept: float | None = None,
    published: bool = False,
) -> Plan:
    """Return the plan that `load` would carry out, without reading weights. Raises what `load` raises.

    With `published` the processor of the device that `simulate` names is not this machine's, measured, but goes by
    what others published of it, with llama.cpp. Raises `ConfigError` for a device of which nothing is known.
    """
    drafted_by = None if draft is None else os.fspath(draft)
    wishes = Wishes(
        memory, backend, threads, context, simulate, 1, speculate, drafted_by, kv, spill, parallel, attention, kept,
        published,
    )  # fmt: skip
    if is_genai_folder(path):
        from edgelm.opening_graph import graph_plan

        return graph_plan(Path(path), wishes)
    ready = get_ready(path, wishes)
    ready.close()
    return ready.prepared.plan


def get_ready(
    path: str | PathLike[str],
    wishes: Wishes,
    making: _Making | None = None,
    host_bytes: int | None = None,
) -> Ready:
    """Decide everything. Without `making` nothing is written: the plan is that of a model that would be prepared.

    Takes the first of the chosen backends that goes through with it. `host_bytes`: this is done on trial for another
    process, which takes so much.
    """
    kept_share(wishes)  # what cannot work is said before anything is done
    device = device_of(wishes.simulate, wishes.threads, wishes.published)
    n_threads = threads_of(wishes.threads, device)
    tune_allocator()
    source = open_path(path)
    budget_bytes, note = budget_of(wishes.memory, device)
    asked = Asked(os.fspath(path), budget_bytes, n_threads, wishes)
    host = _Host(current_platform().rss_bytes(), host_bytes)
    choice = choose(source, wishes.backend, asked)  # trial runs in children, if any, come before this process grows
    if is_folder(path):
        from edgelm.engine.foldertext import build_tables_apart

        build_tables_apart(Path(path), source.fingerprint)
    tokenizer = load_tokenizer(source)
    failures: list[EdgeLMError] = []
    notes = list(note)
    for name in choice.names:
        try:
            ready = _with_backend(name, source, tokenizer, asked, device, making, host)
        except (BackendUnavailable, BudgetTooSmall, PreparationError, UnsupportedModel) as exc:
            failures.append(exc)
            notes.append(f"{name}: passed over after all, {getattr(exc, 'reason', exc)}")
        else:
            return ready._replace(notes=(*notes, *choice.notes, *ready.notes))
    too_small = [exc for exc in failures if isinstance(exc, BudgetTooSmall)]
    raise min(too_small, key=lambda exc: exc.needed_bytes) if too_small else failures[0]


class _Host(NamedTuple):
    """What this process took when it had loaded nothing, and what the one takes for which this is a trial, if any."""

    here_bytes: int
    there_bytes: int | None

    @property
    def beside_bytes(self) -> int:
        return self.there_bytes or 0

    @property
    def more_bytes(self) -> int:
        """What the other process will take more than this one."""
        return 0 if self.there_bytes is None else self.there_bytes - self.here_bytes


def _with_backend(
    name: str,
    source: ModelFile,
    tokenizer: Tokenizer,
    asked: Asked,
    device: Device | None,
    making: _Making | None,
    host: _Host,
) -> Ready:
    wishes = asked.wishes
    request = Request(
        asked.budget_bytes, wishes.context, asked.n_threads, wishes.max_outputs, wishes.speculate, wishes.kv,
        spill=wishes.spill, parallel=wishes.parallel,
    )  # fmt: skip
    if (kept := kept_share(wishes)) is not None:
        request = replace(request, attention=wishes.attention, kept=kept, speculate=guesses(wishes))
    prompts, answers = split_name(name)
    parts: list[Part] = []
    try:
        names = (answers, prompts) if prompts else (answers,)
        usual = replace(request, kv="f16")  # all that prompts on another backend, or a draft, must be able to keep
        for one in names:
            part = _open_part(one, source, usual if parts else request, device, making, host, len(names))
            parts.append(part)  # at once: if the next one fails, this one is closed
        trim()
        phases = [part.phase for part in parts]

        def planned(request: Request) -> Prepared:
            return prepare(phases[0], request, process_bytes_of(source) + host.more_bytes, *phases[1:])

        draft: Draft | None = None
        more: tuple[str, ...] = ()
        if wishes.draft is None or not wishes.speculate:
            prepared = planned(request)
            more = ("the draft model is left out: nothing is to be guessed",) if wishes.draft is not None else ()
        else:
            from edgelm.drafting import with_draft

            def opened(file: ModelFile) -> Part:
                return _open_part(answers, file, usual, device, making, host, 1)

            prepared, draft, more = with_draft(wishes.draft, source, request, opened, planned)
            if prepared.model.encodes:
                raise ConfigError("a model that embeds texts guesses nothing; leave the draft model out")
    except BaseException:
        for part in parts:
            part.close()
        raise
    told = (*(sentence for part in parts for sentence in part.told), *more)
    return Ready(source, tokenizer, name, tuple(parts), prepared, told, draft)


def _open_part(
    name: str,
    source: ModelFile,
    request: Request,
    device: Device | None,
    making: _Making | None,
    host: _Host,
    n_sharing: int,
) -> Part:
    """Open a backend, with the model as it wants it, and measure what it computes a second.

    `n_sharing` backends hold weights of the model in the same budget.
    """
    budget_bytes, n_threads = request.budget_bytes, request.n_threads
    chosen, session = open_session(name, n_threads)
    store: Store | None = None
    try:
        file, readable, told, lost = _in_layout(source, chosen, session, request, making)
        store = derived(open_store([str(part) for part in readable.paths])[0], readable)
        if device:
            store = ThrottledStore(store, device.flash_bytes_per_s, device.latency_s)
        free_bytes = budget_bytes - current_platform().rss_bytes() - host.beside_bytes - SPARE_BYTES
        room = min(max(free_bytes, 0), MEASURING_BYTES)
        pattern = (
            flash_pattern(store, readable, room, device)
            if device or may_stream(file, budget_bytes // n_sharing)
            else None
        )
        flash_bytes_per_s = pattern.bytes_per_s if pattern else 0.0
        reads = (store, readable) if pattern else None
        rates = (
            published_rates(device.processor, flash_bytes_per_s)
            if device and device.processor
            else measured_rates(chosen, session, file, n_threads, flash_bytes_per_s, limit_bytes=room, reads=reads)
        )
    except BaseException:
        session.close()
        if store is not None:
            store.close()
        raise
    simulated = (device.name if device else "", name if chosen.capabilities().simulated else "")
    rates = rates._replace(simulated=", ".join(filter(None, simulated)) or None)
    return Part(Phase(file, chosen, session, rates, pattern), store, told, lost)


def _in_layout(
    source: ModelFile, backend: Backend, session: Session, request: Request, making: _Making | None
) -> tuple[ModelFile, ModelFile, tuple[str, ...], tuple[str, ...]]:
    """Return the model as the backend wants it, the model whose files can be read, what the user should know, and what
    is lost.

    Its matrices are put into the backend's layout if they never were; without `making` that is only reckoned.
    """
    source, told, lost = computable(source, backend)
    layout = layout_for(source, backend)
    if layout is None:
        return source, source, told, lost
    from edgelm.engine.preparing import look_up, prepare_file

    found = look_up(source, layout)
    told, lost = (*told, *found.errors), (*lost, *found.errors)
    if found.exists:
        return found.file, found.file, told, lost
    if making is None:
        return found.file, source, told, lost
    phase = Phase(found.file, backend, session, None)
    prepare(phase, request, process_bytes_of(source))  # refuses before the work, not after
    where = f"{human(found.file.file_bytes[0])} in {found.file.paths[0].parent}"
    if making.notice is not None:
        making.notice(f"preparing {source.name} for the {backend.name} backend, once: {where}")
    file = prepare_file(source, layout, backend.name, making.progress)
    return file, file, (*told, f"prepared for the {backend.name} backend: {where}"), lost


def process_bytes_of(file: ModelFile) -> int:
    """Return what the process takes before a model's memory, with what the first chat will still import."""
    late = TEMPLATE_BYTES if "tokenizer.chat_template" in file.metadata and "jinja2" not in sys.modules else 0
    return Meter().sample().rss_bytes + late
