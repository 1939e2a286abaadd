"""Engines of tiny models at exact budgets: the process counts nothing, so a budget is what the engine owns."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import edgelm_onnx.layout
from edgelm.engine import demand
from edgelm.engine.backend import Backend
from edgelm.engine.forward import Engine
from edgelm.engine.health import check
from edgelm.engine.loading import Prepared, Request, build, computable, layout_for, open_path, prepare
from edgelm.engine.preparing import prepare_file
from edgelm.engine.registry import get_backend
from edgelm.errors import BudgetTooSmall
from edgelm.files.model import ModelFile
from edgelm.memory import plan as planning
from edgelm.memory.derived import derived
from edgelm.memory.plan import Plan
from edgelm.memory.stores import MemoryStore, Store
from edgelm.sizes import GB

BACKENDS = ("numpy", "llamacpp", "mlx", "onnx")
CHUNK = 16
NOISE = {"numpy": 2e-3, "llamacpp": 0.02, "mlx": 0.01, "onnx": 0.1}
"""What other arithmetic in the attention (and the rounding of later layers' keys) changes in logits of tiny models."""


@cache
def _why_not(backend: str) -> str:
    found = check(backend)
    return "" if found.available else found.reason


def need(backend: str) -> str:
    """Return the backend's name, or skip the test where it does not work."""
    if reason := _why_not(backend):
        pytest.skip(f"backend {backend} is not available: {reason}")
    return backend


def shrink(monkeypatch: pytest.MonkeyPatch, *chunks: int) -> None:
    """Let slots be as small as tiny models need them to be, and prompt passes as wide as `chunks`."""
    monkeypatch.setattr(planning, "MIN_SLOT_BYTES", 4096)
    monkeypatch.setattr(edgelm_onnx.layout, "TILE_BYTES", 4096)
    monkeypatch.setattr(demand, "CHUNKS", chunks or (CHUNK,))


def prepared_at(
    path: Path,
    budget_bytes: int,
    *,
    backend: str = "numpy",
    context: int = 64,
    max_outputs: int = 1,
    speculate: bool = False,
) -> Prepared:
    """Return the plan of a budget; the caller closes its session."""
    return prepared_as(path, Request(budget_bytes, context, 1, max_outputs, speculate), backend)


def prepared_as(path: Path, request: Request, backend: str = "numpy") -> Prepared:
    """Return the plan of a request; the caller closes its session."""
    chosen = get_backend(backend)
    session = chosen.open(1)
    try:
        return prepare(in_layout(path, chosen), chosen, session, request, 0, None)
    except BaseException:
        session.close()
        raise


def in_layout(path: Path, backend: Backend) -> ModelFile:
    """Return the model as a backend wants it."""
    file, _, _ = computable(open_path(path), backend)
    layout = layout_for(file, backend)
    return file if layout is None else prepare_file(file, layout, backend.name)


def plan_at(path: Path, budget_bytes: int, backend: str = "numpy", context: int = 64, max_outputs: int = 1) -> Plan:
    prepared = prepared_at(path, budget_bytes, backend=backend, context=context, max_outputs=max_outputs)
    prepared.session.close()
    return prepared.plan


def budgets(path: Path, n: int = 5, backend: str = "numpy", context: int = 64, max_outputs: int = 1) -> list[int]:
    """Return `n` budgets from the smallest that works to the smallest with which everything stays."""
    with pytest.raises(BudgetTooSmall) as caught:
        plan_at(path, 1, backend, context, max_outputs)
    least = caught.value.needed_bytes
    most = plan_at(path, GB, backend, context, max_outputs).planned_bytes
    assert least < most
    return [least + (most - least) * i // (n - 1) for i in range(n)]


def some_by_default(architectures: Iterable[str]) -> list[Any]:
    """Return architectures as parameters of a test, all but the two most different ones among the slow tests."""
    return [
        name if name in ("llama", "gemma3") else pytest.param(name, marks=pytest.mark.slow) for name in architectures
    ]


@contextmanager
def engine_at(
    path: Path,
    budget_bytes: int,
    *,
    backend: str = "numpy",
    context: int = 64,
    max_outputs: int = 1,
    speculate: bool = False,
    wrap: Callable[[Store], Store] = lambda store: store,
) -> Iterator[Engine]:
    """Open an engine whose weights come from memory through `wrap`."""
    prepared = prepared_at(
        path, budget_bytes, backend=backend, context=context, max_outputs=max_outputs, speculate=speculate
    )
    with opened(prepared, wrap) as engine:
        yield engine


@contextmanager
def opened(prepared: Prepared, wrap: Callable[[Store], Store] = lambda store: store) -> Iterator[Engine]:
    """Open the engine of a plan; its weights come from memory through `wrap`."""
    store = wrap(MemoryStore([part.read_bytes() for part in prepared.file.paths]))
    engine = build(prepared, derived(store, prepared.file))
    try:
        yield engine
    finally:
        engine.close()
