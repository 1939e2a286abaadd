"""Backends that die, hang and lie are told from those that work, once, and the verdict is kept."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest

from edgelm.engine import health, registry
from edgelm.engine.health import check, choose
from edgelm.errors import BackendUnavailable, UnknownBackend, UnsupportedModel
from edgelm.files.gguf import open_model
from edgelm.testing.tiny import tiny_model

_BACKEND = """
import os, signal, sys, time
from pathlib import Path
from edgelm.engine.backend import Availability, Capabilities
from edgelm.files.ggml_types import TensorType

class Backend:
    name = {name!r}
    def identity(self):
        return Path({identity!r}).read_text()
    def capabilities(self):
        return Capabilities(frozenset({types}))
    def probe(self):
        Path({trace!r}).write_text(Path({trace!r}).read_text() + "x")
        {probe}

BACKEND = Backend()
"""
_WORKS = "return Availability(True, version='1.0')"


class Made:
    """A backend written to a folder, and how often it was tried."""

    def __init__(self, folder, monkeypatch):
        self.folder, self.monkeypatch = folder, monkeypatch
        self.trace, self.identity = folder / "trace", folder / "identity"
        self.trace.write_text("")
        self.identity.write_text("one")

    def __call__(self, probe, name="made", types="TensorType"):
        module = f"module_{name}_{time.monotonic_ns()}"
        text = _BACKEND.format(name=name, identity=str(self.identity), types=types, trace=str(self.trace), probe=probe)
        (self.folder / f"{module}.py").write_text(text)
        # the child has no patched table, so it gets its backend under a name that both sides look up as a module
        (self.folder / "sitecustomize.py").write_text(
            f"import edgelm.engine.registry as r\nr.BACKENDS = {{**r.BACKENDS, {name!r}: '{module}:BACKEND'}}\n"
        )
        self.monkeypatch.setattr(registry, "BACKENDS", {**registry.BACKENDS, name: f"{module}:BACKEND"})

    @property
    def tries(self):
        return len(self.trace.read_text())


@pytest.fixture
def made(tmp_path, monkeypatch):
    monkeypatch.setenv("EDGELM_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("EDGELM_RECHECK", raising=False)
    folder = tmp_path / "modules"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    return Made(folder, monkeypatch)


def test_a_verdict_is_kept_until_the_library_changes(made, monkeypatch):
    made(_WORKS)
    assert [check("made").version for _ in range(3)] == ["1.0"] * 3
    assert made.tries == 1
    made.identity.write_text("two")
    assert check("made").available
    assert made.tries == 2
    check("made", fresh=True)
    monkeypatch.setenv("EDGELM_RECHECK", "1")
    check("made")
    assert made.tries == 4


def test_a_kept_verdict_costs_little(made):
    made(_WORKS)
    check("made")

    def seconds():
        start = time.perf_counter()
        check("made")
        return time.perf_counter() - start

    assert min(seconds() for _ in range(10)) < 0.01


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
@pytest.mark.parametrize("name", ["SIGSEGV", "SIGILL", "SIGABRT"])
def test_a_crash_becomes_a_sentence(made, name):
    made(f"os.kill(os.getpid(), signal.{name})")
    for _ in range(2):
        found = check("made")
        assert not found.available
        assert found.reason == f"its library crashed ({name}) in a trial run"
    assert made.tries == 1


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_a_killed_trial_is_repeated_later(made, monkeypatch):
    made("os.kill(os.getpid(), signal.SIGKILL)")
    assert "killed, perhaps because memory ran out" in check("made").reason
    check("made")
    assert made.tries == 1
    now = time.time()
    monkeypatch.setattr(health.time, "time", lambda: now + health.DOUBT_S + 1)
    check("made")
    assert made.tries == 2


def test_a_hang_ends(made, monkeypatch):
    monkeypatch.setattr(health, "TIMEOUT_S", 0.5)
    made("time.sleep(60)")
    start = time.perf_counter()
    assert check("made").reason == "it did not answer within 0.5 s in a trial run"
    assert time.perf_counter() - start < 10


@pytest.mark.parametrize(
    ("probe", "reason"),
    [
        ("return Availability(False, 'not installed')", "not installed"),
        ("raise RuntimeError('broken')", "its trial run failed: RuntimeError: broken"),
        ("os._exit(3)", "its trial run failed (exit code 3)"),
        ("os._exit(0)", "its trial run gave no answer"),
    ],
)
def test_a_failure_gives_its_reason(made, probe, reason):
    made(probe)
    found = check("made")
    assert (found.available, found.reason) == (False, reason)


def test_chatter_of_a_library_is_no_verdict(made):
    made("print('{\"available\": false}'); print('loading'); return Availability(True, version='2')")
    assert check("made").version == "2"


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"available": true, "reason": "", "version": "", "until": "x"}'])
def test_a_damaged_verdict_is_not_believed(made, tmp_path, content):
    made(_WORKS)
    check("made")
    (file,) = (tmp_path / "cache" / "health").iterdir()
    file.write_text(content)
    assert check("made").available
    assert made.tries == 2
    assert json.loads(file.read_text())["version"] == "1.0"


def test_a_cache_that_cannot_be_written_costs_only_time(made, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("EDGELM_CACHE", str(tmp_path / "file" / "below"))
    made(_WORKS)
    assert check("made").available
    assert check("made").available
    assert made.tries == 2


def test_a_frozen_application_has_no_interpreter_to_start(made, monkeypatch):
    made(_WORKS)
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    monkeypatch.setattr(subprocess, "run", None)
    assert check("made").available


def test_numpy_needs_no_child(made, monkeypatch):
    monkeypatch.setattr(subprocess, "run", None)
    assert check("numpy").available


def test_the_child_is_lean():
    code = "import sys; from edgelm.engine.registry import get_backend; get_backend('llamacpp').probe(); "
    code += "print(sorted({'numpy', 'subprocess', 'hashlib', 'platformdirs'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.fixture
def file(tmp_path):
    return open_model(tiny_model(tmp_path / "tiny.gguf", "llama", types="Q8_0"))


def test_auto_takes_the_first_that_works(made, monkeypatch, file):
    made(_WORKS, name="llamacpp")
    backend, notes = choose(file)
    assert backend.name == "llamacpp"
    assert notes == ("llamacpp: chosen (1.0)",)


@pytest.mark.parametrize(
    ("probe", "types", "note"),
    [
        ("return Availability(False, 'not installed')", "TensorType", "llamacpp: passed over, not installed"),
        (_WORKS, "[TensorType.F32]", "llamacpp: passed over, it does not compute Q8_0"),
    ],
)
def test_auto_says_why_it_passed_one_over(made, file, probe, types, note):
    made(probe, name="llamacpp", types=types)
    backend, notes = choose(file)
    assert backend.name == "numpy"
    assert notes[0] == note
    assert notes[1].startswith("numpy: chosen (NumPy ")


def test_no_backend_for_a_type(made, monkeypatch, file):
    made(_WORKS, types="[TensorType.F32]")
    monkeypatch.setattr(health, "PREFERRED", ("made",))
    monkeypatch.setattr(health, "backend_names", lambda: ("made",))
    with pytest.raises(UnsupportedModel, match="made: passed over, it does not compute Q8_0"):
        choose(file)


def test_a_wanted_backend_or_its_reason(made, file):
    made("return Availability(False, 'not today')")
    assert choose(file, "numpy")[0].name == "numpy"
    with pytest.raises(BackendUnavailable, match="'made' is not available: not today"):
        choose(file, "made")
    with pytest.raises(UnknownBackend, match="available: "):
        choose(file, "onxx")
