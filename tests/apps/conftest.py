"""Every test has its own home, cache and pip configuration, and reaches no network."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import fake_engine
import pytest

import edgelm
from edgelm_apps.cli import main

HERE = Path(__file__).parent


class Result(NamedTuple):
    code: int
    out: str
    err: str

    def json(self) -> Any:
        return json.loads(self.out)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in [name for name in os.environ if name.startswith(("PIP_", "HF_", "XDG_", "EDGELM_", "_EDGELM"))]:
        if name != "EDGELM_TEST_MODELS":
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("EDGELM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(HERE), *filter(None, sys.path)]))
    (tmp_path / "home").mkdir()
    return tmp_path


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> list[fake_engine.FakeModel]:
    """Put the simulated engine behind `edgelm`; returns the list of models that get loaded."""
    for name, value in fake_engine.replacements().items():
        monkeypatch.setitem(vars(edgelm), name, value)  # setattr would import the real one first
    monkeypatch.setattr(fake_engine, "LOADED", [])
    return fake_engine.LOADED


@pytest.fixture
def model_file(tmp_path: Path) -> str:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF")
    return str(path)


@pytest.fixture
def edgelm_command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Run one command line in this process."""

    def run(*argv: str, stdin: bytes = b"") -> Result:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8"))
        code = main(list(argv))
        captured = capsys.readouterr()
        return Result(code, captured.out, captured.err)

    return run


@pytest.fixture
def child_command() -> Callable[..., Result]:
    """Run one command line on the simulated engine in a child process."""

    def run(*argv: str, stdin: bytes = b"") -> Result:
        done = subprocess.run(
            [sys.executable, str(HERE / "fake_cli.py"), *argv], input=stdin, capture_output=True, timeout=30
        )
        return Result(done.returncode, done.stdout.decode(), done.stderr.decode())

    return run
