"""From a path and a budget to a running engine, with everything that is decided on the way: backend, threads, budget.

The order matters: what stays in the process is loaded first and measured, then memory is planned, then weights come.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from os import PathLike
from typing import TYPE_CHECKING

from edgelm.engine.backend import Backend, Session
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
    """A loaded model and what was decided: `notes` are sentences for the user."""

    file: ModelFile
    tokenizer: Tokenizer
    engine: Engine
    prepared: Prepared
    backend: str
    notes: tuple[str, ...]


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
) -> Opened:
    """Load a model inside a budget; see `edgelm.load`."""
    ready = _get_ready(path, memory, backend, threads, context, max_outputs, simulate)
    try:
        loader = open_loader([str(part) for part in ready.file.paths], ready.store)
        checked = verified(ready.store, ready.file)
        engine = build(ready.prepared, checked, verified(loader, ready.file, again=ready.store), progress)
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
) -> _Ready:
    device = get_device(simulate) if simulate is not None else None
    if threads is not None and threads < 1:
        raise ConfigError(f"threads must be at least 1, got {threads}")
    platform = current_platform()
    n_threads = threads or (min(platform.cores(), device.n_threads) if device else platform.cores())
    tune_allocator()
    file = open_indexed(path)
    chosen, notes = choose(file, backend)  # a trial run in a child, if any, comes before this process grows
    tokenizer = load_tokenizer(file)
    budget_bytes, note = _budget(memory, device)
    store, _ = open_store([str(part) for part in file.paths])
    if device:
        store = ThrottledStore(store, device.flash_bytes_per_s, device.latency_s)
    session: Session | None = None
    try:
        session = chosen.open(n_threads)
        room = min(max(budget_bytes - platform.rss_bytes() - SPARE_BYTES, 0), MEASURING_BYTES)
        pattern = _pattern(store, file, room, device) if device or _may_stream(file, budget_bytes) else None
        flash_bytes_per_s = pattern.bytes_per_s if pattern else 0.0
        rates = measured_rates(
            chosen, session, file, n_threads, flash_bytes_per_s, limit_bytes=room, store=store if pattern else None
        )
        if device:
            rates = replace(rates, simulated=device.name)
        trim()
        request = Request(budget_bytes, context, n_threads, max_outputs)
        prepared = prepare(file, chosen, session, request, _process_bytes(file), rates, pattern)
    except BaseException:
        if session is not None:
            session.close()
        store.close()
        raise
    return _Ready(file, tokenizer, chosen, session, store, prepared, (*note, *notes))


def _old_tables(file: ModelFile) -> tuple[str, ...]:
    if file.pack is None or file.pack.has_tables(FORMAT):
        return ()
    return ("the tokenizer tables of this pack are of another edgelm; pack the model again for a faster start",)


def with_flash(prepared: Prepared, engine: Engine, file: ModelFile) -> Prepared:
    """Return what a model was prepared from with its flash measured, which a resident model has no use for."""
    if prepared.rates is None:
        return prepared
    engine.pattern = _pattern(engine.store, file, RESERVE_BYTES)
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
    return 2 * sum(file.file_bytes) > budget_bytes - current_platform().rss_bytes()


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
