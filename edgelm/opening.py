"""From a path and a budget to a running engine, with everything that is decided on the way: backend, threads, budget.

The order matters: what stays in the process is loaded first and measured, then memory is planned, then weights come.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from os import PathLike
from typing import TYPE_CHECKING

from edgelm.engine.backend import Backend, Session, layout_of
from edgelm.engine.calibration import measured_rates
from edgelm.engine.demand import CHUNKS, RESERVE_BYTES
from edgelm.engine.forward import Engine
from edgelm.engine.health import choose
from edgelm.engine.loading import Prepared, Request, build, default_context, prepare
from edgelm.errors import ConfigError
from edgelm.files.index import open_indexed
from edgelm.files.model import ModelFile
from edgelm.memory.meter import Meter
from edgelm.memory.plan import Plan
from edgelm.memory.platform import current_platform
from edgelm.memory.platform.allocator import trim, tune_allocator
from edgelm.memory.stores import Store, ThrottledStore, open_loader, open_store
from edgelm.memory.verified import verified
from edgelm.simulated import Device, get_device
from edgelm.sizes import MB, human, parse_size
from edgelm.text.tables import FORMAT
from edgelm.text.tokenizer import Tokenizer, load_tokenizer

if TYPE_CHECKING:
    from edgelm.memory.flash import ReadPattern

TEMPLATE_BYTES = 6_500_000
"""The template engine, which is imported when the first chat is rendered."""
MEASURING_BYTES = 100 * MB
"""Memory that measuring the device may take where the budget has it: weights must not fit into a cache."""
SPARE_BYTES = 8 * MB
"""What measuring leaves of the budget."""
SPARE_SHARE = 0.8
"""Share of the available memory that a model without a stated budget may take: the rest is the device's margin."""


@dataclass(frozen=True, slots=True)
class Opened:
    """A loaded model and what was decided: `notes` are sentences for the user, `file` is the model's own."""

    file: ModelFile
    tokenizer: Tokenizer
    engine: Engine
    prepared: Prepared
    backend: str
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Making:
    """Who hears of the work if a model has to be prepared for the backend."""

    progress: Callable[[int, int], None] | None
    notice: Callable[[str], None] | None


@dataclass(frozen=True, slots=True)
class _Ready:
    """All but the weights."""

    file: ModelFile
    tokenizer: Tokenizer
    backend: Backend
    session: Session
    store: Store
    prepared: Prepared
    notes: tuple[str, ...]


def open_engine(
    path: str | PathLike[str],
    *,
    memory: str | int | None = None,
    backend: str = "auto",
    threads: int | None = None,
    context: int | None = None,
    max_outputs: int = 1,
    simulate: str | None = None,
    progress: Callable[[int, int], None] | None = None,
    notice: Callable[[str], None] | None = None,
) -> Opened:
    """Load a model inside a budget; see `edgelm.load`."""
    making = _Making(progress, notice)
    ready = _get_ready(path, memory, backend, threads, context, max_outputs, simulate, making)
    try:
        file = ready.prepared.file
        loader = open_loader([str(part) for part in file.paths], ready.store)
        checked = verified(ready.store, file)
        engine = build(ready.prepared, checked, verified(loader, file, again=ready.store), progress)
        if loader is not ready.store:
            loader.close()
    except BaseException:
        ready.session.close()
        ready.store.close()
        raise
    notes = (*ready.notes, *concessions(ready.prepared.plan, context or default_context(ready.file)))
    notes += _old_tables(ready.file)
    return Opened(ready.file, ready.tokenizer, engine, ready.prepared, ready.backend.name, notes)


def plan(
    path: str | PathLike[str],
    *,
    memory: str | int | None = None,
    backend: str = "auto",
    threads: int | None = None,
    context: int | None = None,
    simulate: str | None = None,
) -> Plan:
    """Return the plan that `load` would carry out, without reading weights. Raises what `load` raises."""
    ready = _get_ready(path, memory, backend, threads, context, 1, simulate)
    ready.session.close()
    ready.store.close()
    return ready.prepared.plan


def _get_ready(
    path: str | PathLike[str],
    memory: str | int | None,
    backend: str,
    threads: int | None,
    context: int | None,
    max_outputs: int,
    simulate: str | None,
    making: _Making | None = None,
) -> _Ready:
    """Decide everything. Without `making` nothing is written: the plan is that of a model that would be prepared."""
    device = get_device(simulate) if simulate is not None else None
    if threads is not None and threads < 1:
        raise ConfigError(f"threads must be at least 1, got {threads}")
    platform = current_platform()
    n_threads = threads or (min(platform.cores(), device.n_threads) if device else platform.cores())
    tune_allocator()
    source = open_indexed(path)
    chosen, notes = choose(source, backend)  # a trial run in a child, if any, comes before this process grows
    tokenizer = load_tokenizer(source)
    budget_bytes, note = _budget(memory, device)
    request = Request(budget_bytes, context, n_threads, max_outputs)
    session = chosen.open(n_threads)
    store: Store | None = None
    try:
        file, readable, told = _in_layout(source, chosen, session, request, making)
        store, _ = open_store([str(part) for part in readable.paths])
        if device:
            store = ThrottledStore(store, device.flash_bytes_per_s, device.latency_s)
        room = min(max(budget_bytes - platform.rss_bytes() - SPARE_BYTES, 0), MEASURING_BYTES)
        pattern = _pattern(store, readable, room, device) if device or _may_stream(file, budget_bytes) else None
        flash_bytes_per_s = pattern.bytes_per_s if pattern else 0.0
        reads = (store, readable) if pattern else None
        rates = measured_rates(chosen, session, file, n_threads, flash_bytes_per_s, limit_bytes=room, reads=reads)
        if device:
            rates = replace(rates, simulated=device.name)
        trim()
        prepared = prepare(file, chosen, session, request, _process_bytes(source), rates, pattern)
    except BaseException:
        session.close()
        if store is not None:
            store.close()
        raise
    return _Ready(source, tokenizer, chosen, session, store, prepared, (*note, *notes, *told))


def _in_layout(
    source: ModelFile, backend: Backend, session: Session, request: Request, making: _Making | None
) -> tuple[ModelFile, ModelFile, tuple[str, ...]]:
    """Return the model as the backend wants it, the model whose files can be read, and what the user should know.

    Its matrices are put into the backend's layout if they never were; without `making` that is only reckoned.
    """
    layout = layout_of(backend)
    if layout is None:
        return source, source, ()
    from edgelm.engine.preparing import look_up, prepare_file

    found = look_up(source, layout)
    if found.exists:
        return found.file, found.file, found.errors
    if making is None:
        return found.file, source, found.errors
    prepare(found.file, backend, session, request, _process_bytes(source), None)  # refuses before the work, not after
    where = f"{human(found.file.file_bytes[0])} in {found.file.paths[0].parent}"
    if making.notice is not None:
        making.notice(f"preparing {source.paths[0].name} for the {backend.name} backend, once: {where}")
    file = prepare_file(source, layout, backend.name, making.progress)
    return file, file, (*found.errors, f"prepared for the {backend.name} backend: {where}")


def _old_tables(file: ModelFile) -> tuple[str, ...]:
    if file.pack is None or file.pack.has_tables(FORMAT):
        return ()
    return ("the tokenizer tables of this pack are of another edgelm; pack the model again for a faster start",)


def with_flash(prepared: Prepared, engine: Engine) -> Prepared:
    """Return what a model was prepared from with its flash measured, which a resident model has no use for."""
    if prepared.rates is None:
        return prepared
    engine.pattern = _pattern(engine.store, prepared.file, RESERVE_BYTES)
    rates = replace(prepared.rates, flash_bytes_per_s=engine.pattern.bytes_per_s)
    return replace(prepared, pattern=engine.pattern, rates=rates)


def _pattern(store: Store, file: ModelFile, limit_bytes: int, device: Device | None = None) -> ReadPattern:
    from edgelm.memory.flash import DEFAULT_SHAPE, ReadPattern  # resident models do without

    if device is not None:
        speed = device.read_bytes_per_s(DEFAULT_SHAPE.block_bytes)
        return ReadPattern(*DEFAULT_SHAPE, store.how, speed, device.latency_s, 0.0)
    from edgelm.engine.reading import read_pattern

    return read_pattern(store, file, limit_bytes)


def _may_stream(file: ModelFile, budget_bytes: int) -> bool:
    """Say whether the flash's speed can matter: whether weights, with what comes with them, could miss the budget."""
    return 2 * file.total_tensor_bytes > budget_bytes - current_platform().rss_bytes()


def _process_bytes(file: ModelFile) -> int:
    """Return what the process takes before a model's memory, with what the first chat will still import."""
    late = TEMPLATE_BYTES if "tokenizer.chat_template" in file.metadata and "jinja2" not in sys.modules else 0
    return Meter().sample().rss_bytes + late


def _budget(memory: str | int | None, device: Device | None) -> tuple[int, tuple[str, ...]]:
    """Return the budget in bytes and, if nobody stated one or a device is simulated, a sentence on that."""
    simulated = (
        (f"simulated flash of {device}; the processor is this machine's own, not slowed down",) if device else ()
    )
    if memory is None and device:
        memory = device.memory_bytes
    if memory is not None:
        return parse_size(memory), simulated
    platform = current_platform()
    available = platform.available_bytes() + platform.rss_bytes()
    budget = int(available * SPARE_SHARE)
    return budget, (
        f"no --memory given: {human(budget)} is the budget, {SPARE_SHARE:.0%} of the {human(available)} free here",
    )


def concessions(plan: Plan, wanted: int) -> tuple[str, ...]:
    """Return what was given up to keep the budget, a sentence each. `wanted`: the context without a budget."""
    notes: list[str] = []
    if plan.context < wanted:
        notes.append(f"context shortened from {wanted} to {plan.context} tokens: the budget holds no more")
    if plan.chunk < min(CHUNKS[0], plan.context):
        notes.append(f"prompts are read in passes of {plan.chunk} tokens instead of {CHUNKS[0]}")
    if plan.streamed:
        notes.append(f"{human(plan.streamed_bytes)} of {human(plan.pass_bytes)} weights are read from flash each pass")
    return tuple(notes)
