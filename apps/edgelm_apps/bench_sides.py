"""The processes that `edgelm bench` measures in: starts one, asks it, says how it ended, and sets its memory limit.

Knows pipes and control groups; what is measured is in `bench_child`.
"""

from __future__ import annotations

import glob
import json
import subprocess
import sys
import tempfile
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from edgelm_apps import limited

GIVE_UP_S = 10.0
"""How long a process may take to end once it has nothing more to do."""


class Ended(Exception):
    """The process measures nothing: it refused, or it died. `needed_bytes` is the smallest budget, if that was it."""

    def __init__(self, why: str, exit_code: int = 1, needed_bytes: int | None = None) -> None:
        self.exit_code, self.needed_bytes = exit_code, needed_bytes
        super().__init__(why)


class Process:
    """A child that has loaded a model; `facts` is what it says of that. Use it as a context manager.

    `limit_bytes` puts it into a memory cgroup of that size, with the model evicted from the page cache, so that what
    it maps is charged to it; `limit` says whether that worked. Raises `Ended` where nothing was loaded.
    """

    def __init__(self, spec: dict[str, Any], limit_bytes: int | None = None) -> None:
        stack = self._stack = ExitStack()
        self._group: limited.Group | None = None
        self.limit = "none: no budget was given"
        try:
            argv = [sys.executable, "-m", "edgelm_apps.bench_child", json.dumps(spec)]
            if limit_bytes is not None:
                argv = self._limited(argv, limit_bytes, Path(spec["model"]))
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            self._said = Path(folder, "stderr")
            with self._said.open("w") as said:
                self._child = subprocess.Popen(
                    argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said, text=True
                )
            stack.callback(self._end)
            self.facts = self._answer()
            if "error" in self.facts:
                raise Ended(self.facts["error"], self.facts["exit_code"], self.facts["needed_bytes"])
        except BaseException:
            self._stack.close()
            raise

    def measure(self, test: dict[str, Any]) -> dict[str, Any]:
        """Have a test run once. Raises `Ended` if the process dies of it, and from then on."""
        assert self._child.stdin is not None
        with suppress(BrokenPipeError):  # it has died: its answer says so
            self._child.stdin.write(json.dumps(test) + "\n")
            self._child.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._child.stdout is not None
        line = self._child.stdout.readline()
        if line:
            answer: dict[str, Any] = json.loads(line)
            return answer
        code = self._child.wait()
        if self._group is not None and self._group.oom_kills:
            raise Ended("killed: it needs more memory than the limit")
        last = (self._said.read_text(errors="replace").strip().splitlines() or ["it said nothing"])[-1]
        raise Ended(f"the process ended with code {code}: {last[-200:]}")

    def _limited(self, argv: list[str], limit_bytes: int, model: Path) -> list[str]:
        try:
            self._group = self._stack.enter_context(limited.group(limit_bytes))
        except limited.NoCgroup as error:
            self.limit = f"none: {error}"
            return argv
        self.limit = "memory cgroup"
        for part in model.parent.glob(glob.escape(model.name).replace("-00001-of-", "-*-of-")):
            limited.evict(part)
        return self._group.command(argv)

    def _end(self) -> None:
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        with suppress(BrokenPipeError):
            self._child.stdin.close()
        try:
            self._child.wait(GIVE_UP_S)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()
        self._child.stdout.close()

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()
