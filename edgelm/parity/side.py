"""A backend in a child process, seen from outside: ask it for logits, and learn how it ended if it did."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from contextlib import suppress
from types import TracebackType
from typing import Any

import numpy as np

from edgelm.engine.children import can_start
from edgelm.errors import ConfigError, EdgeLMError
from edgelm.parity.measures import Floats

PATIENCE_S = 600.0
"""How long one answer may take. The first one includes loading and, for some backends, converting the model."""


class SideFailed(EdgeLMError):
    """A backend's process refused, died or hung. `refused` tells the first: the backend said so itself."""

    def __init__(self, sentence: str, exit_code: int | None = None) -> None:
        self.refused = exit_code is not None
        self.exit_code = exit_code if exit_code is not None else 1
        super().__init__(sentence)


class Side:
    """A process that does what `edgelm.parity.child` can. Raises `SideFailed` if it does not."""

    def __init__(self, **spec: Any) -> None:
        if not can_start():
            raise ConfigError("backends are compared in processes of their own: run this with a Python interpreter")
        folders = [os.path.abspath(folder) for folder in sys.path]
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115  closed with the side
        self._process = subprocess.Popen(
            # -P: a folder that the user happens to stand in is no place for modules
            [sys.executable, "-P", "-m", "edgelm.parity.child", json.dumps(spec, default=str)],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(folders)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
        )
        self._hung = False
        try:
            self.facts = self._read()
        except BaseException:
            self.close()
            raise

    def forward(self, ids: Sequence[int], rows: int = 1, *, clear: bool = False) -> Floats:
        """Append `ids` to the cache, which is emptied first with `clear`; return the logits of the last `rows`."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"ids": list(ids), "rows": rows, "clear": clear}).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise SideFailed(self._ending()) from None
        return np.frombuffer(self._read()["payload"], np.float32).reshape(rows, -1)

    def _read(self) -> dict[str, Any]:
        """Return the next answer; what comes after it is its `payload`."""
        stdout = self._process.stdout
        assert stdout is not None
        watch = threading.Timer(PATIENCE_S, self._give_up)
        watch.daemon = True
        watch.start()
        try:
            line = stdout.readline()
            said: dict[str, Any] = json.loads(line) if line.endswith(b"\n") else {"ended": True}
            if "error" in said:
                raise SideFailed(said["error"], said["exit_code"])
            n_bytes = int(np.prod(said.get("shape", [0]))) * 4
            said["payload"] = stdout.read(n_bytes)
            if "ended" in said or len(said["payload"]) < n_bytes:
                raise SideFailed(self._ending())
            return said
        finally:
            watch.cancel()

    def _give_up(self) -> None:
        self._hung = True
        self._process.kill()

    def _ending(self) -> str:
        """Return how the process ended, as a sentence."""
        code = self._process.wait()
        if self._hung:
            return f"it gave no answer within {PATIENCE_S:g} s"
        self._stderr.seek(0)
        lines = [line.strip() for line in self._stderr.read().decode(errors="replace").splitlines() if line.strip()]
        said = f": {lines[-1]}" if lines else ""
        if code < 0:
            try:
                return f"its process died ({signal.Signals(-code).name}){said}"
            except ValueError:
                pass
        return f"its process ended with exit code {code}{said}"

    def close(self) -> None:
        """End the process. Safe to call twice."""
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with suppress(BrokenPipeError):  # a request that a dead process did not take
                    pipe.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._stderr.close()

    def __enter__(self) -> Side:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
