"""A display without a screen, and models that answer long enough to be interrupted."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import edgelm
from edgelm.testing import tiny_model

APPS = Path(__file__).resolve().parents[2] / "apps"
sys.path.append(str(APPS))  # the examples are not in the wheel; what is in it goes first


@pytest.fixture(scope="session")
def screen() -> Iterator[str]:
    """Return the name of a display of our own; skips without Xvfb (Debian: `apt install xvfb`)."""
    if shutil.which("Xvfb") is None:
        pytest.skip("there is no Xvfb here to open a window in (Debian: apt install xvfb)")
    told, tells = os.pipe()
    child = subprocess.Popen(
        ["Xvfb", "-displayfd", str(tells), "-screen", "0", "800x600x24", "-nolisten", "tcp"],
        pass_fds=[tells], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    os.close(tells)
    try:
        with os.fdopen(told) as answers:
            number = answers.readline().strip()  # said when it takes clients
        if not number:
            pytest.skip(f"Xvfb does not start here (exit code {child.wait(10)})")
        yield f":{number}"
    finally:
        child.terminate()
        child.wait(10)


@pytest.fixture
def display(screen: str, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("DISPLAY", screen)
    return screen


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of a fraction of a millisecond a token."""
    return tiny_model(tmp_path_factory.mktemp("examples") / "tiny.gguf", "llama")


@pytest.fixture(scope="session")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that takes a while: for answers that are to be interrupted."""
    shape: dict[str, Any] = {"n_layers": 8, "n_embd": 512, "n_heads": 8, "n_kv_heads": 4, "head_dim": 64, "n_ff": 1536}
    return tiny_model(tmp_path_factory.mktemp("examples") / "slow.gguf", "llama", **shape)


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the examples keep what they find out of this machine: one process of a test need not try it all again."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def example(cache: Path) -> Callable[..., subprocess.Popen[str]]:
    """Start an example as its reader would: `example("summarise", model, …)`, with pipes for everything."""

    def start(name: str, *arguments: object, **options: Any) -> subprocess.Popen[str]:
        command = [sys.executable, str(APPS / f"edgelm_examples/{name}.py"), *map(str, arguments)]
        options.setdefault("env", {**os.environ, "EDGELM_CACHE": str(cache)})
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(command, **{**pipes, **options})

    return start


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch, known_rates: None) -> Callable[..., edgelm.Model]:
    """Have `edgelm.load` compute with NumPy in one thread, without measuring the device or trying other backends.

    Random models end their answers at random; these never do before the limit.
    """
    load = edgelm.load

    def wrapped(path: Any, **options: Any) -> edgelm.Model:
        model = load(path, **{**options, "backend": "numpy", "threads": 1})
        model.tokenizer.eos_ids = frozenset()  # type: ignore[misc]
        return model

    monkeypatch.setattr(edgelm, "load", wrapped)
    return wrapped
