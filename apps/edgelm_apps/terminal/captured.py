"""What other code writes to stdout and stderr while the screen is drawn: heard, instead of torn over it.

At the level of file descriptors, so that C libraries and child processes are heard too.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import TextIO


class Captured:
    """While inside, each line that is written reaches `hear`, from another thread; `terminal` still is the terminal."""

    def __init__(self, hear: Callable[[str], None]) -> None:
        self._hear = hear

    def __enter__(self) -> Captured:
        sys.stdout.flush()
        sys.stderr.flush()
        self._kept = (os.dup(1), os.dup(2))
        reading, writing = os.pipe()
        self.terminal: TextIO = open(os.dup(self._kept[0]), "w", encoding=sys.stdout.encoding, errors="replace")
        os.dup2(writing, 1)
        os.dup2(writing, 2)
        os.close(writing)
        self._reader = threading.Thread(target=self._read, args=(reading,), name="edgelm-stderr", daemon=True)
        self._reader.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, kept in enumerate(self._kept, start=1):
            os.dup2(kept, number)  # closes the last writing ends of the pipe, unless a child still has one
            os.close(kept)
        with suppress(OSError):  # what was not drawn yet, where the terminal was closed
            self.terminal.close()
        self._reader.join(1)

    def _read(self, reading: int) -> None:
        with open(reading, encoding="utf-8", errors="replace") as lines:
            for line in lines:
                if line.strip():
                    self._hear(line.rstrip())
