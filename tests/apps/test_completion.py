"""Completion in real shells: what the script of `edgelm completion` makes of a Tab."""

from __future__ import annotations

import os
import pty
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

PATIENCE_S = 60
TYPED = (
    ("edgelm dra", "edgelm draft "),
    ("edgelm run smoll", "edgelm run smollm2-135m-instruct "),  # of the catalogue
    ("edgelm show min", "edgelm show mine "),  # of the cache
    ("edgelm run org/re", "edgelm run org/repo:Q4_0 "),
    ("edgelm run x --att", "edgelm run x --attention "),
    ("edgelm run x --attention fil", "edgelm run x --attention filtered "),
    ("edgelm chat --simulate pi4-u", "edgelm chat --simulate pi4-usb-ssd "),
)
SETUP = {
    "bash": (["--norc", "--noprofile", "-i"], "bind 'set enable-bracketed-paste off'; "),
    "zsh": (["-f", "-i"], "autoload -Uz compinit; compinit -u -D; unsetopt zle_bracketed_paste prompt_cr; "),
}


@pytest.fixture(autouse=True)
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put `edgelm` on the path, and two models into the cache."""
    from edgelm_models import cache

    folder = tmp_path / "bin"
    folder.mkdir()
    script = folder / "edgelm"
    script.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m edgelm_apps.cli "$@"\n')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    about = {"size_bytes": 4, "sha256": "", "quantization": "Q4_0", "context": None, "licence": "", "source": "hub"}
    for name in ("mine", "org/repo:Q4_0"):
        staged = tmp_path / "cache" / "staged"
        staged.mkdir(parents=True)
        (staged / "model.gguf").write_bytes(b"GGUF")
        cache.register(cache.CachedModel(name, "model.gguf", ("model.gguf",), pulled_at_s=0.0, **about), staged)


class Terminal:
    """A shell that somebody types into."""

    def __init__(self, argv: list[str]) -> None:
        self._master, slave = pty.openpty()
        environment = {**os.environ, "TERM": "dumb", "PS1": "READY> ", "INPUTRC": os.devnull, "PROMPT": "READY> "}
        self._process = subprocess.Popen(
            argv, stdin=slave, stdout=slave, stderr=slave, env=environment, start_new_session=True
        )
        os.close(slave)
        self._shown = ""

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    def wait_for(self, text: str) -> str:
        """Return what was shown until `text` appeared."""
        deadline = time.monotonic() + PATIENCE_S
        while text not in self._shown:
            ready, _, _ = select.select([self._master], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, f"{text!r} did not appear: {self._shown[-500:]!r}"
            self._shown += os.read(self._master, 4096).decode(errors="replace")
        before, _, self._shown = self._shown.partition(text)
        return before

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._master)


@pytest.fixture
def terminal(request: pytest.FixtureRequest) -> Iterator[Terminal]:
    shell = request.param
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    arguments, setup = SETUP[shell]
    found = Terminal([shell, *arguments])
    found.type(f"{setup}eval \"$(edgelm completion {shell})\"; printf 'TAUGHT%s' '!'\n")
    found.wait_for("TAUGHT!")
    yield found
    found.close()


@pytest.mark.parametrize("terminal", SETUP, indirect=True)
def test_a_tab_completes(terminal: Terminal) -> None:
    for typed, completed in TYPED:
        terminal.type(f"{typed}\t")
        terminal.wait_for(completed)
        terminal.type("\x15")  # Ctrl-U: away with the line


def test_fish_completes() -> None:
    if shutil.which("fish") is None:
        pytest.skip("fish is not installed")
    asked = "; ".join(f"complete -C '{typed}'" for typed, _ in TYPED)
    done = subprocess.run(
        ["fish", "--no-config", "-c", f"edgelm completion fish | source; {asked}"],
        capture_output=True, text=True, timeout=PATIENCE_S, check=True,
    )  # fmt: skip
    offered = [line.partition("\t")[0] for line in done.stdout.splitlines()]
    assert offered == [completed.split()[-1] for _, completed in TYPED]
