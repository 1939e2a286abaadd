"""What was typed into chats, kept for the next one: a file that lines and screen share.

A line of the file is a line that was typed; one that ends with a backslash goes on in the next, as in the chat. What
people say to a model is theirs: only the user may read the file.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

MOST_LINES = 1000
LIBEDIT = "_HiStOrY_V2_"
"""The first line of a file that Python wrote with libedit in the place of readline; its lines have octal escapes."""


def history_file() -> Path:
    """Return where typed lines are kept: the user's state folder."""
    from platformdirs import user_state_path

    return user_state_path("edgelm", appauthor=False) / "chat_history"


class History:
    """Messages of earlier chats, oldest first in `entries`; `add` keeps another. `trouble` says why nothing is kept."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.trouble = ""
        lines, worn = self._read()
        self.entries = _joined(lines)
        if worn:
            self._write("".join(f"{line}\n" for line in lines), "w")

    def add(self, text: str) -> None:
        """Keep a message, unless it is the last one again or says nothing."""
        if not text.strip() or self.entries[-1:] == [text]:
            return
        self.entries.append(text)
        safe = f"{text} " if text.endswith("\\") else text
        self.add_line(safe.replace("\n", "\\\n"))

    def add_line(self, line: str) -> None:
        """Keep a line as it was typed."""
        if line.strip():
            self._write(f"{line}\n", "a")

    def _read(self) -> tuple[list[str], bool]:
        """Return the lines that are kept, and whether the file should be written anew."""
        try:
            lines = self._path.read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:
            return [], False
        if lines[:1] == [LIBEDIT]:
            return [re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), line) for line in lines[1:]], True
        return lines[-MOST_LINES:], len(lines) > MOST_LINES

    def _write(self, text: str, mode: str) -> None:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with open(self._path, mode, encoding="utf-8", errors="replace", opener=_private) as file:
                os.chmod(self._path, 0o600)  # of an older file, too
                file.write(text)
        except OSError as error:
            self.trouble = f"the history could not be saved in {self._path}: {error.strerror}"


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _joined(lines: list[str]) -> list[str]:
    entries, parts = [], []
    for line in lines:
        if line.endswith("\\"):
            parts.append(line[:-1])
            continue
        entries.append("\n".join([*parts, line]))
        parts = []
    return entries + (["\n".join(parts)] if parts else [])
