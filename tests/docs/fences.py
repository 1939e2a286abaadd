"""What the documentation shows: its fenced blocks, the commands in them, and the comments above that are for tests.

Reads CommonMark, with markdown-it-py; runs nothing. A comment directly above a block says what a test must know:

    <!-- not run: REASON -->   the block stays unrun, and is listed with the reason
    <!-- slow -->              the block runs with the slow tests, as do those that it needs files of
    <!-- needs: NAME, ... -->  modules or programs without which it is skipped
    <!-- run with: BEGINNING = OPTIONS; ... -->  options added to commands that begin so, to make them shorter
    <!-- exit: CODE -->        every command of it fails with this exit code
    <!-- goes on -->           a Python block that goes on after the one before it
    <!-- before: CODE -->      Python that runs before the block (may have many lines)
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from markdown_it import MarkdownIt

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
RUN_PAGES = [page for page in PAGES if page.name not in ("CONTRIBUTING.md", "CHANGELOG.md")]
SHELL, PYTHON = ("sh", "console"), ("python",)
_DIRECTIVE = re.compile(r"<!--\s*(not run|slow|needs|run with|exit|goes on|before)(?::\s*(.*?))?\s*-->", re.DOTALL)
_HEREDOC = re.compile(r"<<-?\s*['\"]?(\w+)")


class Block(NamedTuple):
    page: str
    line: int
    language: str
    text: str
    said: Mapping[str, str]
    """The comments above, by their first words."""

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


class Step(NamedTuple):
    """A command, or a script of Python."""

    block: Block
    line: int
    text: str
    shown: tuple[str, ...]
    """What a console shows below a command."""
    first: str
    """What runs before, in the same process: what earlier lines of the block have set, or an earlier script."""

    def __str__(self) -> str:
        return f"{self.block.page}:{self.line}"


def blocks(page: Path) -> list[Block]:
    """Return the fenced blocks of a page, in order."""
    found, said = [], {}
    for token in MarkdownIt().parse(page.read_text(encoding="utf-8")):
        if token.type == "html_block":
            said |= {match[1]: (match[2] or "") for match in _DIRECTIVE.finditer(token.content)}
        elif token.type == "fence":
            assert token.map is not None
            found.append(Block(page.name, token.map[0] + 1, token.info.strip(), token.content, said))
            said = {}
        elif token.type != "paragraph_close":
            assert not said, f"{page.name}: {said} stands above no block"
    return found


def steps_of(blocks_of_page: list[Block]) -> Iterator[Step]:
    """Yield what the blocks of a page tell to do, in order."""
    earlier = ""
    for block in blocks_of_page:
        if block.language in SHELL:
            yield from commands(block)
        elif block.language in PYTHON:
            first = f"{earlier if 'goes on' in block.said else ''}{block.said.get('before', '')}\n"
            yield Step(block, block.line, block.text, (), first)
            earlier = first + block.text


def commands(block: Block) -> Iterator[Step]:
    """Yield the commands of a shell's block, each with what is shown of its output."""
    first = ""
    for line, text, shown in _console(block) if block.language == "console" else _script(block):
        yield Step(block, line, text, tuple(shown), first)
        if re.match(r"(export|cd)\s", text):
            first += f"{text}\n"


def _console(block: Block) -> Iterator[tuple[int, str, list[str]]]:
    lines = block.text.splitlines()
    starts = [number for number, line in enumerate(lines) if line.startswith("$ ")]
    for start, end in zip(starts, [*starts[1:], len(lines)], strict=True):
        yield block.line + 1 + start, lines[start][2:], lines[start + 1 : end]


def _script(block: Block) -> Iterator[tuple[int, str, list[str]]]:
    """Put lines together that are one command: continued ones, and those with a document behind them."""
    pending: list[str] = []
    until = None
    for number, line in enumerate(block.text.splitlines(), block.line + 1):
        if not pending and (not line.strip() or line.startswith("#")):
            continue
        pending.append(line)
        if until is None and (begun := _HEREDOC.search(line)):
            until = begun[1]
        elif until is not None and line.strip() == until:
            until = None
        if until is None and not line.endswith("\\"):
            yield number - len(pending) + 1, "\n".join(pending), []
            pending = []


_BLOCKS = {page: blocks(page) for page in PAGES}
BLOCKS = [block for found in _BLOCKS.values() for block in found]
STEPS = [step for page in RUN_PAGES for step in steps_of(_BLOCKS[page])]
