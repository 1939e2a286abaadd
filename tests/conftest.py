"""What all tests share: a home and a cache of their own, the real models where there are any, memory limits."""

from __future__ import annotations

import itertools
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from real_models import REAL_MODELS

from edgelm.sizes import parse_size
from edgelm_apps import limited


def pytest_configure() -> None:
    """Let Ctrl-C reach the children of tests, also where a runner in the background has it ignored."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the tests of applications last: what they import takes 100 MB, which would count in others' budgets."""
    items.sort(key=lambda item: item.path.parent.name in ("server", "connectors", "examples", "docs"))


@pytest.fixture(autouse=True)
def own_home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test sees the user's files, settings or cache, nor those of another test."""
    for name in list(os.environ):
        if name.startswith(("EDGELM_", "HF_", "XDG_")) and name != "EDGELM_TEST_MODELS":
            monkeypatch.delenv(name)
    folder = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.setenv("USERPROFILE", str(folder))
    monkeypatch.setenv("EDGELM_CACHE", str(folder / "cache"))


@pytest.fixture
def known_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the device be measured already: each test has a cache of its own."""
    from edgelm import opening
    from edgelm.memory.predict import Rates

    monkeypatch.setattr(opening, "measured_rates", lambda *_, **__: Rates(1e9, 1e9))


STRANGER = """
import os, signal, sys, time
from pathlib import Path
from edgelm.engine.backend import Availability, Capabilities
from edgelm.files.ggml_types import TensorType
from edgelm_numpy import BACKEND as NUMPY

class Session:
    \"\"\"NumPy's, but for what a test changes.\"\"\"
    def __init__(self, inner):
        self._inner = inner
    def __getattr__(self, name):
        return getattr(self._inner, name)

class Backend:
    name = {name!r}
    def probe(self):
        return Availability(True, version="1.0")
    def capabilities(self):
        return Capabilities(NUMPY.capabilities().types)
    def open(self, n_threads):
        return Session(NUMPY.open(n_threads))

{changes}
BACKEND = Backend()
"""
_numbers = itertools.count()


@pytest.fixture
def install_backend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Install a stranger's backend for this test: `install_backend(name, changes)`; children find it too.

    It lends NumPy's programs; `changes` is code that may change the classes `Backend` and `Session`. Returns the name
    of its module.
    """
    folder = tmp_path / "strangers"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(folder), *filter(None, sys.path)]))

    def install(name: str, changes: str = "") -> str:
        module = f"stranger_{name}_{next(_numbers)}"  # what was imported for another test stays imported
        (folder / f"{module}.py").write_text(STRANGER.format(name=name, changes=changes), encoding="utf-8")
        about = folder / f"{module}-1.0.dist-info"
        about.mkdir()
        (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n")
        (about / "entry_points.txt").write_text(f"[edgelm.backends]\n{name} = {module}:BACKEND\n")
        return module

    return install


@pytest.fixture
def real_model() -> Callable[[str], Path]:
    """Return the file of a model of the catalogue by name, or skip the test where it is not."""

    def path_of(name: str) -> Path:
        if name not in REAL_MODELS:
            pytest.skip(f"{name} is not here: `edgelm pull {name}`, or name a folder in EDGELM_TEST_MODELS")
        return REAL_MODELS[name]

    return path_of


@pytest.fixture
def within_memory() -> Callable[..., Any]:
    """Run a command in a memory cgroup: `within_memory("150MB", argv, evict=FILE)` tells peak, hits and kills.

    The result is `edgelm_apps.limited.Limited`. Skips where no memory cgroup can be made.
    """

    def run(size: str | int, argv: list[str], evict: Path | None = None, cold: bool = False) -> Any:
        try:
            if evict is not None:
                limited.evict(evict)
            if cold:
                limited.evict_everything()
            return limited.run(argv, parse_size(size))
        except (limited.NoCgroup, PermissionError) as error:
            pytest.skip(f"no limit can be set here: {error}")

    return run


@pytest.fixture
def memory_group() -> Iterator[Callable[[str], Any]]:
    """Make a memory cgroup for several commands: `memory_group("300MB")`; skips where none can be made."""
    with ExitStack() as stack:

        def make(size: str) -> Any:
            try:
                return stack.enter_context(limited.group(parse_size(size)))
            except limited.NoCgroup as error:
                pytest.skip(f"no limit can be set here: {error}")

        yield make
