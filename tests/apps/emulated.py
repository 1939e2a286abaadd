"""A program behind a pseudo-terminal, seen through an emulator: tests read what a person would see."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path
from typing import Any

import pyte

FAKE_CLI = str(Path(__file__).parent / "fake_cli.py")
BACK = "\x1b[?1049l"
"""The terminal leaves its second screen: what follows stays in its scrollback."""


class Emulated:
    """One program on a terminal of its own. `raw` is every byte it wrote, as text."""

    def __init__(self, *argv: str, columns: int = 80, rows: int = 24, **env: str) -> None:
        self._master, self._slave = pty.openpty()
        self._size(columns, rows)
        self.before: list[Any] = termios.tcgetattr(self._slave)
        environment = {key: value for key, value in os.environ.items() if key not in ("NO_COLOR", "COLUMNS", "LINES")}
        self.child = subprocess.Popen(
            [sys.executable, *argv], stdin=self._slave, stdout=self._slave, stderr=self._slave, start_new_session=True,
            env=environment | {"TERM": "xterm-256color", **env},
        )  # fmt: skip
        self._screen = pyte.Screen(columns, rows)
        self._stream = pyte.ByteStream(self._screen)
        self.raw = ""

    @property
    def lines(self) -> list[str]:
        """The lines that are seen now."""
        return [line.rstrip() for line in self._screen.display]

    @property
    def text(self) -> str:
        return "\n".join(self.lines)

    def look(self, expected: str, absent: str = "", timeout_s: float = 20) -> str:
        """Wait until `expected` is seen (and `absent` is not), and return the whole screen."""
        deadline = time.monotonic() + timeout_s
        while not (expected in self.text and (not absent or absent not in self.text)):
            assert self._hear(deadline), f"{expected!r} is not seen (or {absent!r} is); the screen shows\n{self.text}"
        return self.text

    def bold(self, word: str) -> bool:
        """Say whether the last `word` that is seen is bold."""
        row, column = self._place(word)
        return bool(self._screen.buffer[row][column].bold)

    def colour(self, word: str) -> str:
        """Return the colour of the last `word` that is seen."""
        row, column = self._place(word)
        return str(self._screen.buffer[row][column].fg)

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    def resize(self, columns: int, rows: int) -> None:
        self._size(columns, rows)
        self._screen.resize(rows, columns)
        self.child.send_signal(signal.SIGWINCH)  # the kernel tells only who has the terminal for its own

    def attributes(self) -> list[Any]:
        return termios.tcgetattr(self._slave)

    def end(self) -> int:
        """Wait for the program's end and return its exit code."""
        deadline = time.monotonic() + 20
        while self.child.poll() is None:
            assert time.monotonic() < deadline, f"the program does not end; the screen shows\n{self.text}"
            self._hear(time.monotonic() + 0.05)
        while self._hear(time.monotonic() + 0.05):
            pass
        return self.child.returncode

    def hang_up(self) -> None:
        """Close the terminal, as its window is closed."""
        os.close(self._master)
        self._master = -1

    def close(self) -> None:
        self.child.kill()
        self.child.wait()
        if self._master >= 0:
            os.close(self._master)
        os.close(self._slave)

    def _place(self, word: str) -> tuple[int, int]:
        return [(row, line.index(word)) for row, line in enumerate(self._screen.display) if word in line][-1]

    def _size(self, columns: int, rows: int) -> None:
        fcntl.ioctl(self._slave, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def _hear(self, deadline: float) -> bool:
        if not select.select([self._master], [], [], max(0, deadline - time.monotonic()))[0]:
            return False
        data = os.read(self._master, 1 << 16)
        self.raw += data.decode(errors="replace")
        self._stream.feed(data)
        return True
