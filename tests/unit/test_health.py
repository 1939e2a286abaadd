"""Backends that die, hang and lie are told from those that work, once, and the verdict is kept."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from edgelm.engine import children, health
from edgelm.engine.health import check, open_session
from edgelm.engine.trial import problem_of
from edgelm.errors import BackendUnavailable, UnknownBackend

sys.path.append(str(Path(__file__).parents[1] / "streaming"))
import layout_backends

posix = pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")

PROBE = """
def identity(self):
    return Path({identity!r}).read_text()
def probe(self):
    Path({trace!r}).write_text(Path({trace!r}).read_text() + "x")
    {probe}
Backend.identity, Backend.probe = identity, probe
"""
WORKS = "return Availability(True, version='1.0')"


@pytest.fixture
def made(tmp_path, install_backend):
    """Install a backend "made" with this body of `probe`; `tries` counts how often it was tried."""

    class Made:
        trace, identity = tmp_path / "trace", tmp_path / "identity"

        def __call__(self, probe=WORKS, changes=""):
            self.trace.write_text("")
            self.identity.write_text("one")
            body = PROBE.format(identity=str(self.identity), trace=str(self.trace), probe=probe)
            return install_backend("made", body + changes)

        @property
        def tries(self):
            return len(self.trace.read_text())

    return Made()


def test_a_verdict_is_kept_until_the_library_changes(made, monkeypatch):
    made()
    assert [check("made").version for _ in range(3)] == ["1.0"] * 3
    assert made.tries == 1
    made.identity.write_text("two")
    assert check("made").available
    assert made.tries == 2
    check("made", fresh=True)
    assert made.tries == 3
    monkeypatch.setenv("EDGELM_RECHECK", "1")
    monkeypatch.setattr(health, "_tried", set())  # as in another process
    check("made")
    check("made")
    assert made.tries == 4


def test_a_kept_verdict_costs_little(made):
    made()
    check("made")

    def seconds():
        start = time.process_time()
        check("made")
        return time.process_time() - start

    assert min(seconds() for _ in range(10)) < 0.005


@posix
@pytest.mark.parametrize("name", ["SIGSEGV", "SIGILL"])
def test_a_crash_becomes_a_sentence(made, name):
    made(f"os.kill(os.getpid(), signal.{name})")
    for _ in range(2):
        found = check("made")
        assert not found.available
        assert found.broken
        assert found.reason == f"its library crashed ({name}) in a trial run"
    assert made.tries == 1


@posix
@pytest.mark.parametrize(
    "changes",
    [
        "def open(self, n_threads):\n    os.kill(os.getpid(), signal.SIGSEGV)\nBackend.open = open",
        "Session.compile = lambda self, segment, shape: os.kill(os.getpid(), signal.SIGSEGV)",
        "class Dies:\n    def run(self, bindings):\n        os.kill(os.getpid(), signal.SIGSEGV)\n"
        "Session.compile = lambda self, segment, shape: Dies()",
        "import atexit; atexit.register(os.kill, os.getpid(), signal.SIGSEGV)",
    ],
    ids=["when it is opened", "when it compiles", "when it computes", "when it ends"],
)
def test_a_crash_after_the_probe_is_found_too(install_backend, changes):
    install_backend("made", changes)
    assert check("made").reason == "its library crashed (SIGSEGV) in a trial run"


@posix
def test_what_dies_when_it_is_imported_is_never_imported_here(install_backend):
    module = install_backend("made", "os.kill(os.getpid(), signal.SIGSEGV)")
    for _ in range(2):
        assert check("made").reason == "its library crashed (SIGSEGV) in a trial run"
    assert module not in sys.modules


@posix
def test_a_killed_trial_is_repeated_later(made, monkeypatch):
    made("os.kill(os.getpid(), signal.SIGKILL)")
    assert "killed in a trial run, perhaps because memory ran out" in check("made").reason
    check("made")
    assert made.tries == 1
    now = time.time()
    monkeypatch.setattr(health.time, "time", lambda: now + health.DOUBT_S + 1)
    check("made")
    assert made.tries == 2


def test_a_hang_ends(made, monkeypatch):
    monkeypatch.setattr(health, "TIMEOUT_S", 1.5)
    made("time.sleep(60)")
    start = time.perf_counter()
    assert check("made").reason == "it did not answer within 1.5 s in a trial run"
    assert time.perf_counter() - start < 10


@pytest.mark.parametrize(
    ("probe", "reason", "broken"),
    [
        ("return Availability(False, 'not installed')", "not installed", False),
        ("raise RuntimeError('broken')", "it failed in a trial run: RuntimeError: broken", True),
        ("os._exit(3)", "it failed in a trial run (exit code 3)", True),
        ("os._exit(0)", "its trial run gave no answer", True),
    ],
)
def test_a_failure_gives_its_reason(made, probe, reason, broken):
    made(probe)
    found = check("made")
    assert (found.available, found.reason, found.broken) == (False, reason, broken)


TWICE = """
import ctypes
class Twice:
    def __init__(self, program, segment):
        self.program, self.widths = program, [segment.values[i].width for i in segment.outputs]
    def run(self, bindings):
        self.program.run(bindings)
        for address, width in zip(bindings.outputs, self.widths):
            numbers = (ctypes.c_float * width).from_address(address)
            numbers[:] = [2 * x for x in numbers]
Session.compile = lambda self, segment, shape: Twice(self._inner.compile(segment, shape), segment)
"""
NOTHING = """
class Nothing:
    def run(self, bindings):
        pass
Session.compile = lambda self, segment, shape: Nothing()
"""


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (TWICE, "1.0 computes wrong results here: a product with F32 weights is off by 100%"),
        (NOTHING, "1.0 computes wrong results here: a product with F32 weights is off by nan%"),
        ("Session.version = '0.9'", "it says that it is 1.0, but what it loads is 0.9"),
        ("Backend.identity = lambda self: str(time.time())", "its library changed while it was tried"),
        (
            "from edgelm.errors import BackendUnavailable as No\n"
            "def open(self, n_threads):\n    raise No('made', 'no')\nBackend.open = open",
            "it says that it works, but cannot be opened: no",
        ),
    ],
)
def test_a_lie_is_found_out(install_backend, changes, reason):
    install_backend("made", changes)
    found = check("made")
    assert (found.available, found.broken, found.reason) == (False, True, reason)


def test_what_was_tried_must_be_what_is_opened(install_backend, tmp_path):
    said = tmp_path / "version"
    said.write_text("1.0")
    install_backend("made", f"Session.version = property(lambda self: Path({str(said)!r}).read_text())")
    backend, session = open_session("made", 1)
    session.close()
    assert backend.name == "made"
    said.write_text("2.0")
    with pytest.raises(BackendUnavailable, match=r"it was tried as 1\.0, but what it loads now is 2\.0"):
        open_session("made", 1)


@pytest.mark.parametrize("backend", [layout_backends.SHUFFLED, layout_backends.ADOPTING], ids=lambda one: one.name)
def test_layouts_and_copies_of_its_own_are_tried_too(backend, monkeypatch):
    assert problem_of(backend, "1") == ""
    layout = type(backend.layout())
    monkeypatch.setattr(layout, "pack", lambda self, info, first_row, rows, out: None)
    assert "1 computes wrong results here: a product with F32 weights is off by" in problem_of(backend, "1")


def test_chatter_of_a_library_is_no_verdict(made):
    made("print('{\"available\": false}'); print('loading'); return Availability(True, version='2')")
    assert check("made").version == "2"


@pytest.mark.parametrize("content", ["[]", '{"available": true, "reason": "", "version": "", "until": "x"}'])
def test_a_damaged_verdict_is_not_believed(made, content, monkeypatch):
    made()
    check("made")
    (file,) = (health.cache_dir() / "health").iterdir()
    file.write_text(content)
    assert check("made").available
    assert made.tries == 2
    assert json.loads(file.read_text())["version"] == "1.0"


def test_a_cache_that_cannot_be_written_costs_only_time(made, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("EDGELM_CACHE", str(tmp_path / "file" / "below"))
    made()
    assert check("made").available
    assert check("made").available
    assert made.tries == 2


def test_a_frozen_application_has_no_interpreter_to_start(made, monkeypatch):
    made()
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    monkeypatch.setattr(subprocess, "run", None)
    assert check("made").available


def test_a_child_that_cannot_be_started(made, monkeypatch):
    made()
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    found = check("made")
    assert "a trial run could not be started" in found.reason


def test_reports_outlive_a_crash_and_half_a_line():
    code = f"report(a=1); report(b=2); print({children.MARK!r} + '{{\"c\": '); import os; os._exit(4)"
    outcome = children.run_child(code, (), 20, "a test")
    assert outcome == ({"a": 1, "b": 2}, "it failed in a test (exit code 4)", False)


def test_a_child_that_runs_out_of_memory_may_do_better_later():
    assert children.run_child("raise MemoryError", (), 20, "a test") == ({}, "it failed in a test: MemoryError", True)


@pytest.mark.skipif(sys.platform != "linux", reason="Linux lets a process offer itself")
def test_a_child_goes_first_where_memory_runs_out():
    outcome = children.run_child("report(score=open('/proc/self/oom_score_adj').read())", (), 20, "a test")
    assert outcome.facts == {"score": "1000\n"}


def test_no_child_outlives_who_started_it(tmp_path):
    told = tmp_path / "child"
    code = f"import os, time; open({str(told)!r}, 'w').write(f'{{os.getpid()}} '); time.sleep(60)"
    starts = f"from edgelm.engine.children import run_child; run_child({code!r}, (), 60, 'a test')"
    parent = subprocess.Popen([sys.executable, "-c", starts])
    try:
        while not (told.exists() and told.read_text().endswith(" ")):
            assert parent.poll() is None
            time.sleep(0.01)
        child = psutil.Process(int(told.read_text()))
    finally:
        parent.kill()
        parent.wait()
    deadline = time.monotonic() + 20
    while child.is_running() and child.status() != psutil.STATUS_ZOMBIE:  # where nobody collects orphans
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_numpy_needs_no_child(monkeypatch):
    monkeypatch.setattr(subprocess, "run", None)
    assert check("numpy").available


def test_the_child_is_lean():
    code = "import sys; from edgelm.engine.trial import trial; trial('llamacpp', lambda **facts: None); "
    code += "print(sorted({'numpy', 'subprocess', 'hashlib', 'platformdirs', 'importlib.metadata'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_an_unknown_name():
    with pytest.raises(UnknownBackend, match="available: "):
        check("onxx")
