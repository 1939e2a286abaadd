"""Colours of program code. Knows Pygments, no Markdown."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any

from edgelm_apps.terminal.lines import Line

if TYPE_CHECKING:
    from pygments.lexer import Lexer

COMMON = ("python", "bash", "json", "c")
"""Languages whose tables are there from the beginning, so that the plan of the budget counts them."""
TABLES_BYTES = 1_500_000
"""What the tables of one more language may take."""
_KINDS = (
    ("Token.Comment", "class:code.comment"), ("Token.Keyword", "class:code.keyword"),
    ("Token.Literal.String", "class:code.string"), ("Token.Literal.Number", "class:code.number"),
    ("Token.Name.Function", "class:code.name"), ("Token.Name.Class", "class:code.name"),
    ("Token.Name.Decorator", "class:code.name"), ("Token.Name.Tag", "class:code.keyword"),
    ("Token.Name.Builtin", "class:code.builtin"), ("Token.Operator.Word", "class:code.keyword"),
)  # fmt: skip


class Colours:
    """Colours code by its language. `room(n_bytes)` says whether the budget has memory for another language."""

    def __init__(self) -> None:
        self.room: Callable[[int], bool] = lambda _: True
        self._lexers: dict[str, Lexer] = {}

    def warm(self) -> None:
        """Load what most answers need."""
        for language in COMMON:
            self.lines(language, "x = 1\n")

    def lines(self, language: str, code: str) -> list[Line]:
        """Return the lines of `code`; without colours if the language is unknown."""
        lexer = self._lexer(language.lower())
        if lexer is None:
            return [[("class:code", line)] for line in code.split("\n")]
        lines: list[Line] = [[]]
        for kind, text in lexer.get_tokens(code):
            style = _style(kind)
            for number, part in enumerate(text.split("\n")):
                if number:
                    lines.append([])
                if part:
                    lines[-1].append((style, part))
        n_lines = code.count("\n") + 1  # a lexer may end a text with a line feed of its own
        return lines[:n_lines] + [[] for _ in range(n_lines - len(lines))]

    def _lexer(self, language: str) -> Lexer | None:
        if language not in self._lexers:
            name = _languages().get(language)
            if name is None or (language not in COMMON and not self.room(TABLES_BYTES)):
                return None
            from pygments.lexers import find_lexer_class

            found: Any = find_lexer_class(name)
            self._lexers[language] = found(stripnl=False, ensurenl=False)
        return self._lexers[language]


@cache
def _languages() -> dict[str, str]:
    """Return the names of all languages by what people call them. Not Pygments' own search: that imports plugins."""
    from pygments.lexers import get_all_lexers

    return {alias: name for name, aliases, _, _ in get_all_lexers(plugins=False) for alias in aliases}


@cache
def _style(kind: Any) -> str:
    name = str(kind)
    return next((style for prefix, style in _KINDS if name.startswith(prefix)), "class:code")
