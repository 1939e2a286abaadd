"""A backend that segfaults, one that hangs and those that lie are each named, and everything goes on without them."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from edgelm.engine import health
from edgelm.testing.tiny import tiny_model

BROKEN = {
    "segfaults": (
        "Backend.probe = lambda self: os.kill(os.getpid(), signal.SIGSEGV)",
        "its library crashed (SIGSEGV) in a trial run",
    ),
    "hangs": ("Backend.probe = lambda self: time.sleep(600)", "it did not answer within"),
    "lies": ("Session.version = '0.9'", "it says that it is 1.0, but what it loads is 0.9"),
    "dies_late": (
        "Session.compile = lambda self, segment, shape: os.kill(os.getpid(), signal.SIGSEGV)",
        "its library crashed (SIGSEGV) in a trial run",
    ),
    "miscounts": (
        "class Nothing:\n    def run(self, bindings): pass\nSession.compile = lambda self, segment, shape: Nothing()",
        "1.0 computes wrong results here",
    ),
}
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")


@pytest.fixture
def path(tmp_path, install_backend):
    for name, (changes, _) in BROKEN.items():
        install_backend(name, changes)
    return str(tiny_model(tmp_path / "tiny.gguf", "llama", types="Q8_0"))


def named(text: str, form: str) -> bool:
    """Say whether the text has a line for each of the broken backends, with its reason."""
    return all(re.search(form.format(name, re.escape(why)), text, re.M) for name, (_, why) in BROKEN.items())


def test_each_is_named_and_an_answer_comes(path, edgelm_command, monkeypatch):
    monkeypatch.setattr(health, "TIMEOUT_S", 3)
    result = edgelm_command("run", path, "Hello", "--max-tokens", "4", "--context", "64", "--memory", "500MB")
    assert result.code == 0, result.err
    assert result.out.strip()
    assert named(result.err, r"^edgelm: {}: passed over, {}")
    assert named(edgelm_command("backends").out, r"^{} .* no +{}")
    result = edgelm_command("run", path, "Hello", "--backend", "segfaults")
    assert result.code == 7
    assert "'segfaults' is not available: its library crashed (SIGSEGV)" in result.err


@pytest.mark.slow
def test_each_is_named_by_the_real_commands(path):
    def edgelm(*argv: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-P", "-m", "edgelm_apps.cli", *argv]
        return subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=120)

    options = ("--max-tokens", "4", "--context", "128", "--memory", "500MB")
    for _ in range(2):
        done = edgelm("chat", path, *options, stdin="Hello\nand again\n")
        assert done.returncode == 0, done.stderr
        assert len(done.stdout.split("\n")) > 2
        assert named(done.stderr, r"^edgelm: {}: passed over, {}")
    assert named(edgelm("backends").stdout, r"^{} .* no +{}")
    found = edgelm("backends", path, "--memory", "500MB")
    assert named(found.stdout, r"^{} +- +- +- +passed over, {}")
    doctor = edgelm("doctor")
    assert doctor.returncode == 0, doctor.stderr
    assert named(doctor.stdout, r"^ +{} +does not work: {}")
    assert named(doctor.stdout, r"^warning: {} is not used: {}")
