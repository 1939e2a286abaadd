"""From a folder of onnxruntime-genai and a budget to a running engine.

As `edgelm.opening`, for models that are one graph: nothing streams, so nothing is measured and no store is opened.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from edgelm.approximate import kept_share
from edgelm.engine.backend import GraphSession
from edgelm.engine.cache_types import AUTO, parse_types
from edgelm.engine.choosing import Candidate
from edgelm.engine.foldertext import build_tables_apart
from edgelm.engine.graphs import NOT_GRAPHS, choose_for_graph, graph_backend, open_genai
from edgelm.engine.health import check
from edgelm.engine.loading import DEFAULT_CONTEXT, Request
from edgelm.engine.registry import backend_names
from edgelm.engine.whole import CHUNKS, WholeEngine, plan_whole
from edgelm.engine.wishes import Wishes
from edgelm.errors import BudgetTooSmall, ConfigError
from edgelm.files.genai import GenaiFolder
from edgelm.files.model import ModelFile
from edgelm.memory.plan import Plan
from edgelm.memory.platform.allocator import trim, tune_allocator
from edgelm.memory.uncached import uncached
from edgelm.opening import Opened, process_bytes_of
from edgelm.resources import budget_of, device_of, threads_of
from edgelm.sizes import human
from edgelm.text.tokenizer import Tokenizer, load_tokenizer


class _Ready(NamedTuple):
    """All but the weights."""

    file: ModelFile
    folder: GenaiFolder
    tokenizer: Tokenizer
    backend: str
    session: GraphSession
    request: Request
    plan: Plan
    notes: tuple[str, ...]


def open_graph(path: Path, wishes: Wishes, progress: Callable[[int, int], None] | None) -> Opened:
    """Load the model of a folder inside a budget; see `edgelm.load`."""
    ready = _get_ready(path, wishes)
    engine = WholeEngine(ready.folder.model, ready.plan, ready.session, ready.request.n_threads, wishes.max_outputs)
    total = sum(ready.file.file_bytes)
    try:
        if progress is not None:
            progress(0, total)
        with uncached(ready.file.paths):
            engine.load()
        trim()
        if progress is not None:
            progress(total, total)
    except BaseException:
        engine.close()
        raise

    def replanned(budget_bytes: int, more_bytes: int) -> tuple[Plan, tuple[str, ...]]:
        return engine.replan(budget_bytes, more_bytes), ()

    return Opened(ready.file, ready.tokenizer, engine, replanned, ready.backend, ready.notes, (), wishes.speculate)


def graph_plan(path: Path, wishes: Wishes) -> Plan:
    """Return the plan that `open_graph` would carry out, without reading weights."""
    ready = _get_ready(path, wishes)
    ready.session.close()
    return ready.plan


def _get_ready(path: Path, wishes: Wishes) -> _Ready:
    if wishes.simulate is not None:
        raise ConfigError(
            "a simulated device slows down reads while a model runs, and an ONNX graph reads nothing then; "
            "leave --simulate out, or use the model as a GGUF file"
        )
    if wishes.parallel > 1:
        raise ConfigError("an ONNX graph computes one answer at a time; leave parallel out, or use a GGUF file")
    if kept_share(wishes) is not None:
        raise ConfigError(
            "an ONNX graph computes its own attention; leave out the approximate one, or use the model as a GGUF file"
        )
    if wishes.draft is not None:
        raise ConfigError("a draft model guesses for GGUF files; leave --draft out, or use the model as a GGUF file")
    if AUTO[0] not in parse_types(wishes.kv):
        raise ConfigError(
            f"an ONNX graph keeps keys and values as its file says, not as {wishes.kv}; leave --kv out, or use the "
            "model as a GGUF file"
        )
    n_threads = threads_of(wishes.threads, device_of(None, wishes.threads))
    tune_allocator()
    file, folder = open_genai(path)
    chosen, name, notes = choose_for_graph(wishes.backend)
    build_tables_apart(path, file.fingerprint)
    tokenizer = load_tokenizer(file)
    tokenizer.eos_ids |= frozenset(folder.eos_ids)
    budget_bytes, note = budget_of(wishes.memory, None)
    session = chosen.open_graph(folder.model, n_threads)
    try:
        trim()
        request = Request(budget_bytes, wishes.context, n_threads, wishes.max_outputs)
        plan = plan_whole(folder.model, session, request, process_bytes_of(file))
    except BaseException:
        session.close()
        raise
    wanted = wishes.context or min(folder.model.n_context, DEFAULT_CONTEXT)
    return _Ready(
        file, folder, tokenizer, name, session, request, plan, (*note, *notes, *_concessions(folder, plan, wanted))
    )


def _concessions(folder: GenaiFolder, plan: Plan, wanted: int) -> tuple[str, ...]:
    """Return what holds for a graph, and what was given up to keep the budget, a sentence each."""
    notes = ["the model is one ONNX graph: resident only, nothing of it can be read from flash while it runs"]
    if not folder.model.cache_in_place:
        notes.append("its caches do not grow in place: they are kept twice, and prompts are read token by token")
    elif plan.chunk < min(CHUNKS[0], plan.context):
        notes.append(f"prompts are read in passes of {plan.chunk} tokens instead of {CHUNKS[0]}")
    if plan.context < wanted:
        notes.append(
            f"context shortened from {wanted} to {plan.context} tokens: the budget of {human(plan.budget_bytes)} "
            "holds no more"
        )
    return tuple(notes)


def graph_candidates(path: Path, wishes: Wishes) -> tuple[Candidate, ...]:
    """Return every registered backend with what it would do with this graph, the one that is taken first."""
    found: list[Candidate] = []
    for name in backend_names():
        if graph_backend(name) is None:
            found.append(Candidate(name, None, False, NOT_GRAPHS))
            continue
        tried = check(name)
        if not (tried.available or tried.graphs):
            found.append(Candidate(name, tried.version or None, False, tried.reason))
            continue
        chosen = not any(candidate.chosen for candidate in found)
        try:
            plan = graph_plan(path, wishes._replace(backend=name))
        except BudgetTooSmall as exc:
            found.append(Candidate(name, tried.version, False, str(exc), needed_bytes=exc.needed_bytes))
        else:
            reason = "chosen: the model is one ONNX graph" if chosen else "another computes it, too"
            found.append(
                Candidate(name, tried.version, chosen, reason, planned_bytes=plan.planned_bytes, streamed_bytes=0)
            )
    return tuple(sorted(found, key=lambda candidate: not candidate.chosen))
