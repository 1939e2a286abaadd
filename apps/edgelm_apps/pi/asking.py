"""Commands of edgelm in processes of their own: what they load, and what they take, stays out of this one."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import click

from edgelm.errors import EdgeLMError

AMPLE = "64GB"
"""A budget in which everything has room: its plan says what that takes."""


class Failed(EdgeLMError):
    """A command failed; the message is its own, and so is the exit code."""

    def __init__(self, message: str, exit_code: int) -> None:
        self.exit_code = exit_code
        super().__init__(message)


def edgelm_json(*words: object) -> Any:
    """Run a command of edgelm and return the JSON that it prints. Raises `Failed`."""
    argv = [sys.executable, "-m", "edgelm_apps.cli", *map(str, words), "--json"]
    done = subprocess.run(argv, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode == 0:
        return json.loads(done.stdout)
    if done.returncode == -signal.SIGINT:
        raise click.Abort
    said = (done.stderr.strip().splitlines() or [f"`edgelm {words[0]}` died of signal {-done.returncode}"])[-1]
    raise Failed(said.removeprefix("edgelm: error: "), max(done.returncode, 1))


def options(values: Mapping[str, object]) -> list[str]:
    """Return values as words of a command line."""
    return [word for name, value in values.items() for word in (f"--{name}", str(value))]
