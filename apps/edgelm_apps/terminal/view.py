"""The conversation as it is seen: entries one below the other, and which of their lines are in sight.

Only entries near the sight have lines; the others are laid out again when somebody scrolls to them. So a new word costs
the same in a long conversation as in a short one. Knows no terminal.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple, Protocol

from edgelm_apps.terminal.code import Colours
from edgelm_apps.terminal.growing import Growing
from edgelm_apps.terminal.lines import Line, shown, wrapped

MOST_ENTRIES = 2000
MOST_LETTERS = 1_000_000
"""What is kept to scroll back to; the oldest entries beyond it are given up."""
LAID_OUT = 40
"""Entries that keep their lines."""
_COLUMNS = re.compile(r"\S(?:\S| (?! ))* {2,}(?=\S)")


class Entry(Protocol):
    """Something in the conversation. `apart`: a blank line comes before it."""

    apart: bool

    @property
    def n_letters(self) -> int: ...

    def lines(self, width: int) -> tuple[list[Line], list[Line]]:
        """Return the lines that stay, and those that may still change."""

    def forget_lines(self) -> None:
        """Give the memory of the lines back."""


class Plain:
    """A text as it is, in one style; `mark` stands before its first line, and spaces before the others.

    A line of two columns, with two spaces or more between them, goes on below its second column.
    """

    def __init__(self, text: str, style: str = "", mark: str = "", apart: bool = False) -> None:
        self._text, self._style, self._mark, self.apart = shown(text), style, mark, apart
        self._width, self._lines = 0, list[Line]()

    @property
    def n_letters(self) -> int:
        return len(self._text)

    def lines(self, width: int) -> tuple[list[Line], list[Line]]:
        if width != self._width:
            self._width, self._lines = width, []
            before: Line = [(f"{self._style} class:mark".strip(), self._mark)] if self._mark else []
            for line in self._text.split("\n"):
                columns = _COLUMNS.match(line)
                indent = columns.end() if columns and columns.end() < width // 2 else 0
                rest: Line = [("", " " * (len(self._mark) + indent))] if self._mark or indent else []
                self._lines += wrapped([(self._style, line)], width, before, rest)
                before = [("", " " * len(self._mark))] if self._mark else []
        return self._lines, []

    def forget_lines(self) -> None:
        self._width, self._lines = 0, []


class Answer:
    """What the model says, as Markdown, while it says it. Fed from another thread."""

    apart = True

    def __init__(self, colours: Colours) -> None:
        self._growing = Growing(colours)
        self.n_letters = 0

    def feed(self, text: str) -> None:
        self.n_letters += len(text)
        self._growing.feed(text)

    def end(self) -> None:
        self._growing.end()

    def lines(self, width: int) -> tuple[list[Line], list[Line]]:
        return self._growing.lines(width)

    def forget_lines(self) -> None:
        self._growing.forget_lines()


class _Place(NamedTuple):
    """A line: of which entry, and which of it; the blank line before an entry is its line 0."""

    entry: int
    line: int


class View:
    """The entries, and the place below which nothing is in sight (none: the end, and what will come)."""

    def __init__(self) -> None:
        self.entries: list[Entry] = []
        self._below: _Place | None = None
        self._size = (80, 24)

    @property
    def follows(self) -> bool:
        """Whether the end is in sight, and stays there."""
        return self._below is None

    def add(self, entry: Entry) -> None:
        """Put an entry at the end; from any thread."""
        self.entries.append(entry)

    def in_sight(self, width: int, height: int) -> list[Line]:
        """Return the lines to draw."""
        self._size = (width, height)
        self._give_up()
        lines: list[Line] = []
        top = len(self.entries)
        for entry, found in self._upwards(self._below):
            top = entry
            lines[:0] = found[-(height - len(lines)) :]
            if len(lines) >= height:
                break
        for far in self.entries[: max(top - LAID_OUT, 0)]:
            far.forget_lines()
        return lines

    def scroll(self, n_lines: int) -> None:
        """Move the sight up (below 0) or down; down to the end, it follows again."""
        if n_lines < 0:
            self._up(-n_lines)
        elif self._below is not None:
            self._down(n_lines)

    def to_end(self) -> None:
        self._below = None

    def to_beginning(self) -> None:
        self._up(sum(self._height(entry) for entry in range(len(self.entries))))

    def every_line(self, width: int) -> Iterator[Line]:
        """Yield all lines, an entry after the other, and keep none."""
        for number, entry in enumerate(self.entries):
            yield from self._lines_of(number, width)
            entry.forget_lines()

    def _up(self, n_lines: int) -> None:
        place = self._below or self._end()
        height = self._size[1]
        above = 0
        for _, found in self._upwards(place):
            above += len(found)
            if above >= n_lines + height:
                break
        self._below = self._moved(place, -min(n_lines, max(above - height, 0)))
        if self._below == self._end():
            self._below = None

    def _down(self, n_lines: int) -> None:
        assert self._below is not None
        place = self._moved(self._below, n_lines)
        self._below = None if place >= self._end() else place

    def _moved(self, place: _Place, n_lines: int) -> _Place:
        entry, line = place.entry, place.line + n_lines
        while line < 0 and entry > 0:
            entry -= 1
            line += self._height(entry)
        while entry < len(self.entries) - 1 and line > self._height(entry):
            line -= self._height(entry)
            entry += 1
        return _Place(entry, max(line, 0))

    def _end(self) -> _Place:
        last = len(self.entries) - 1
        return _Place(last, self._height(last)) if self.entries else _Place(0, 0)

    def _upwards(self, below: _Place | None) -> Iterator[tuple[int, list[Line]]]:
        """Yield the entries above a place from the lowest up, each with those of its lines that are above it."""
        last = len(self.entries) - 1 if below is None else min(below.entry, len(self.entries) - 1)
        for entry in range(last, -1, -1):
            lines = self._lines_of(entry, self._size[0])
            yield entry, lines[: below.line] if below is not None and entry == below.entry else lines

    def _height(self, entry: int) -> int:
        return len(self._lines_of(entry, self._size[0]))

    def _lines_of(self, number: int, width: int) -> list[Line]:
        entry = self.entries[number]
        stay, change = entry.lines(width)
        gap: list[Line] = [[]] if number and entry.apart else []
        return [*gap, *stay, *change]

    def _give_up(self) -> None:
        """Drop the oldest entries of a conversation that never ends."""
        n_letters = sum(entry.n_letters for entry in self.entries)
        dropped = 0
        while len(self.entries) - dropped > 1 and (
            len(self.entries) - dropped > MOST_ENTRIES or n_letters > MOST_LETTERS
        ):
            n_letters -= self.entries[dropped].n_letters
            dropped += 1
        if dropped:
            del self.entries[:dropped]
            if self._below is not None:
                self._below = _Place(max(self._below.entry - dropped, 0), self._below.line)
