"""An answer that grows: what is whole of it is rendered once, only its end again and again.

Knows where Markdown can be cut in two without changing what it shows, and leaves the rest to `markdown`.
"""

from __future__ import annotations

import re
from collections import deque
from dataclasses import dataclass, field

from edgelm_apps.terminal.code import Colours
from edgelm_apps.terminal.lines import Line, broken, shown
from edgelm_apps.terminal.markdown import closing_rule, code_lines, opening_rule, rendered

_FENCE = re.compile(r" {0,3}(`{3,}|~{3,})([^`]*)$")
_ITEM = re.compile(r"([-*+]|\d{1,9}[.)])( |$)")
_INDENTED_FENCE = re.compile(r"\s+(`{3,}|~{3,})")


@dataclass(slots=True)
class _Prose:
    """Lines of Markdown that are rendered together. `in_code`: amid a fence of a list's item."""

    after_blank: bool
    source: list[str] = field(default_factory=list)
    n_blank: int = 0
    in_code: bool = False

    @property
    def is_list(self) -> bool:
        return bool(self.source) and bool(_ITEM.match(self.source[0]))

    def ends_before(self, line: str) -> bool:
        """Say whether `line` can begin a block of its own."""
        if not self.source or self.in_code:
            return False
        if self.is_list:
            return not line.startswith((" ", "\t")) and bool(self.n_blank or _ITEM.match(line))
        return bool(self.n_blank)

    def add(self, line: str) -> None:
        if _INDENTED_FENCE.match(line) and (self.is_list or self.in_code):
            self.in_code = not self.in_code
        if not self.source and self.n_blank:
            self.after_blank = True
        self.n_blank = 0 if line.strip() else self.n_blank + 1
        if self.source or line.strip():
            self.source.append(line)

    def text(self, tail: str = "") -> str:
        return "\n".join([*self.source, tail] if tail else self.source)

    def lines(self, width: int, colours: Colours) -> list[Line]:
        return rendered(self.text(), width, colours)


@dataclass(slots=True)
class _Code:
    """A fence. While it is open each line is coloured alone, when it closes all of them together."""

    after_blank: bool
    mark: str
    language: str
    source: list[str] = field(default_factory=list)

    def is_closed_by(self, line: str) -> bool:
        text = line.strip()
        return text.startswith(self.mark) and not text.strip(self.mark[0])

    def lines(self, width: int, colours: Colours) -> list[Line]:
        return code_lines(self.language, "\n".join(self.source), width, colours)


class Growing:
    """A text that is fed from one thread and shown by another."""

    def __init__(self, colours: Colours) -> None:
        self._colours = colours
        self._fed: deque[str] = deque()
        self._whole: list[_Prose | _Code] = []
        self._open: _Prose | _Code = _Prose(False)
        self._tail = ""  # the last line, as long as no line feed has ended it
        self._ended = self._finished = False
        self._width = 0
        self._lines: list[Line] = []
        self._open_lines: list[Line] = []
        self._n_coloured = self._n_tail = 0  # of an open fence: its coloured lines, and what follows them on the screen
        self._drawn = True

    def feed(self, text: str) -> None:
        self._fed.append(text)

    def end(self) -> None:
        """Nothing more will be fed."""
        self._ended = True

    def lines(self, width: int) -> tuple[list[Line], list[Line]]:
        """Return the lines that stay as they are, and those of the end, which may change with the next word."""
        if width != self._width:
            self._width, self._lines, self._drawn = width, [], False
            self._restart_open()
            for block in self._whole:
                self._keep(block)
        if self._take() or not self._drawn:
            self._draw_open()
            self._drawn = True
        return self._lines, self._open_lines

    def forget_lines(self) -> None:
        """Give the memory of the lines back; they are rendered again when they are asked for."""
        self._width, self._lines = 0, []
        self._restart_open()

    def _take(self) -> bool:
        """Take in what was fed; return whether there was anything."""
        ended = self._ended  # before the rest is taken: what is fed later is no end
        fed = ""
        while self._fed:
            fed += self._fed.popleft()
        *complete, self._tail = shown(self._tail + fed).split("\n")
        for line in complete:
            self._add(line)
        if ended and not self._finished:
            self._finished = True
            self._add(self._tail)
            self._tail = ""
            self._close(_Prose(False))
            return True
        return bool(fed)

    def _add(self, line: str) -> None:
        block = self._open
        if isinstance(block, _Code):
            if block.is_closed_by(line):
                self._close(_Prose(False))
            else:
                block.source.append(line)
            return
        fence = None if block.in_code or (block.is_list and line.startswith(" ")) else _FENCE.match(line)
        if fence is not None:
            language = (fence[2].split() or [""])[0]
            self._close(_Code(bool(block.n_blank), fence[1], language))
            return
        if block.ends_before(line) and line.strip():
            self._close(_Prose(bool(block.n_blank)))
            block = self._open
            assert isinstance(block, _Prose)
        block.add(line)

    def _close(self, following: _Prose | _Code) -> None:
        """The open block is whole."""
        block = self._open
        if isinstance(block, _Code) or block.source:
            self._whole.append(block)
            if self._width:
                self._keep(block)
        self._open = following
        self._restart_open()

    def _keep(self, block: _Prose | _Code) -> None:
        if self._lines and block.after_blank:
            self._lines.append([])
        self._lines += block.lines(self._width, self._colours)

    def _restart_open(self) -> None:
        self._open_lines, self._n_coloured = [], 0

    def _draw_open(self) -> None:
        block, width = self._open, self._width
        gap: list[Line] = [[]] if self._lines and block.after_blank else []
        if isinstance(block, _Prose):
            text = block.text(self._tail)
            self._open_lines = gap + rendered(completed(text), width, self._colours) if text.strip() else []
            return
        if not self._n_coloured:
            self._open_lines = [*gap, opening_rule(block.language, width)]
        else:
            del self._open_lines[-self._n_tail :]
        for line in block.source[self._n_coloured :]:
            self._open_lines += broken(self._colours.lines(block.language, line)[0], width, width)
        self._n_coloured = len(block.source)
        seen = self._tail.strip(f" {block.mark[0]}")  # what may become the end of the fence is not shown as its code
        tail = broken([("class:code", self._tail)], width, width) if seen else []
        tail.append(closing_rule(width))
        self._n_tail = len(tail)
        self._open_lines += tail


def completed(text: str) -> str:
    """Close what the end of a text has opened, so that a word is bold from its first letter on."""
    head, gap, last = text.rpartition("\n\n")
    if "```" in last:
        return text
    for mark in ("`", "**"):
        if last.count(mark) % 2:
            last = last.rstrip(f"{mark[0]} ")
            last += mark * (last.count(mark) % 2)
    return f"{head}{gap}{last}"
