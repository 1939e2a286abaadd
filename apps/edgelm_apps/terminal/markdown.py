"""Markdown as lines of styled text. Knows markdown-it's tree, no terminal and no stream."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from typing import TYPE_CHECKING

from edgelm_apps.terminal.code import Colours
from edgelm_apps.terminal.lines import Fragment, Line, broken, line_width, width_of, wrapped

if TYPE_CHECKING:
    from markdown_it import MarkdownIt
    from markdown_it.tree import SyntaxTreeNode

RULE = "class:rule"
LEAST_COLUMN = 3
"""Columns that a cell of a table keeps, however narrow the terminal is."""


def rendered(text: str, width: int, colours: Colours) -> list[Line]:
    """Return the lines that show `text` in `width` columns."""
    from markdown_it.tree import SyntaxTreeNode

    root = SyntaxTreeNode(_parser().parse(text))
    return _Renderer(colours, text.split("\n")).blocks(root.children, width)


def code_lines(language: str, code: str, width: int, colours: Colours) -> list[Line]:
    """Return a block of code between two rules; nothing stands beside it, so that it can be copied."""
    lines = [part for line in colours.lines(language, code) for part in broken(line, width, width)]
    return [opening_rule(language, width), *lines, closing_rule(width)]


def opening_rule(language: str, width: int) -> Line:
    label = f" {language} " if 0 < len(language) < width - 6 else ""
    return [(RULE, ("──" + label).ljust(width, "─"))]


def closing_rule(width: int) -> Line:
    return [(RULE, "─" * width)]


@cache
def _parser() -> MarkdownIt:
    from markdown_it import MarkdownIt

    # what is nested deeper is left out; commonmark's own 20 leaves out a list of the tenth level
    return MarkdownIt("commonmark", {"maxNesting": 100}).enable(["table", "strikethrough"])


class _Renderer:
    """One text on its way to lines; `source` are its lines, to see where it has blank ones."""

    def __init__(self, colours: Colours, source: Sequence[str]) -> None:
        self._colours, self._source = colours, source

    def blocks(self, nodes: Sequence[SyntaxTreeNode], width: int) -> list[Line]:
        lines: list[Line] = []
        for node in nodes:
            if lines and self._after_blank(node):
                lines.append([])
            lines += self._block(node, width)
        return lines

    def _after_blank(self, node: SyntaxTreeNode) -> bool:
        begin = node.map[0] if node.map else 0
        return begin > 0 and not self._source[begin - 1].strip(" >")

    def _block(self, node: SyntaxTreeNode, width: int) -> list[Line]:
        match node.type:
            case "heading":
                return wrapped(_inline(node.children, f"class:heading{'.first' * (node.tag == 'h1')}"), width)
            case "paragraph":
                return wrapped(_inline(node.children), width)
            case "bullet_list" | "ordered_list":
                return self._list(node, width)
            case "fence" | "code_block":
                language = (node.info.split() or [""])[0]
                return code_lines(language, node.content.removesuffix("\n"), width, self._colours)
            case "blockquote":
                inner = self.blocks(node.children, max(width - 2, 1))
                return [[(RULE, "│ "), *line] for line in inner]
            case "hr":
                return [closing_rule(width)]
            case "table":
                return table(list(_rows(node)), width)
            case _:  # HTML stays what it is
                return wrapped([("", (node.content or "").rstrip("\n"))], width)

    def _list(self, node: SyntaxTreeNode, width: int) -> list[Line]:
        lines: list[Line] = []
        number = int(node.attrs.get("start", 1))
        for item in node.children:
            if lines and self._after_blank(item):
                lines.append([])
            mark = "• " if node.type == "bullet_list" else f"{number}. "
            number += 1
            inner = self.blocks(item.children, max(width - len(mark), 1)) or [[]]
            lines.append([("class:mark", mark), *inner[0]])
            lines += [[("", " " * len(mark)), *line] if line else [] for line in inner[1:]]
        return lines


def _inline(nodes: Sequence[SyntaxTreeNode], style: str = "") -> list[Fragment]:
    return [fragment for node in nodes for fragment in _spans(node, style)]


def _spans(node: SyntaxTreeNode, style: str) -> Iterator[Fragment]:
    inner = {"strong": "class:strong", "em": "class:em", "s": "class:struck"}.get(node.type)
    if inner is not None:
        yield from _inline(node.children, f"{style} {inner}".strip())
    elif node.type == "code_inline":
        yield f"{style} class:code.inline".strip(), node.content
    elif node.type in ("softbreak", "hardbreak"):
        yield style, "\n"  # models end lines where they mean it
    elif node.type == "link":
        text = _inline(node.children, f"{style} class:link".strip())
        yield from text
        target = str(node.attrs.get("href", ""))
        if target and target.removeprefix("mailto:") != "".join(part for _, part in text):
            yield f"{style} class:rule".strip(), f" ({target})"
    elif node.type == "image":
        yield f"{style} class:link".strip(), node.content or str(node.attrs.get("src", ""))
    elif node.children:
        yield from _inline(node.children, style)
    else:
        yield style, node.content


def _rows(node: SyntaxTreeNode) -> Iterator[list[Line]]:
    for section in node.children:
        style = "class:strong" if section.type == "thead" else ""
        for row in section.children:
            yield [_inline(cell.children, style) for cell in row.children]


def table(rows: Sequence[Sequence[Line]], width: int) -> list[Line]:
    """Return a table, the first row its head; cells are broken where their column is too narrow.

    With more columns than have room side by side, its rows are running text.
    """
    widths = _column_widths(rows, width)
    if sum(widths) + 3 * (len(widths) - 1) > width:
        return [line for row in rows for line in wrapped(_running(row), width)]
    lines: list[Line] = []
    for number, row in enumerate(rows):
        cells = [wrapped(cell, columns) for cell, columns in zip(row, widths, strict=True)]
        for height in range(max(len(cell) for cell in cells)):
            line: Line = []
            for column, (cell, columns) in enumerate(zip(cells, widths, strict=True)):
                part = cell[height] if height < len(cell) else []
                line += [*([(RULE, " │ ")] if column else []), *part, ("", " " * (columns - line_width(part)))]
            lines.append(line)
        if not number:
            lines.append([(RULE, "─┼─".join("─" * columns for columns in widths))])
    return lines


def _running(row: Sequence[Line]) -> Line:
    """Return the cells of a row one after the other."""
    return [part for number, cell in enumerate(row) for part in [*([(RULE, " │ ")] if number else []), *cell]]


def _column_widths(rows: Sequence[Sequence[Line]], width: int) -> list[int]:
    """Return the widths of columns; the widest give way until the table fits."""
    widths = [
        max(max(width_of(part) for part in "".join(text for _, text in cell).split("\n")) for cell in column)
        for column in zip(*rows, strict=True)
    ]
    left = width - 3 * (len(widths) - 1)
    while sum(widths) > left and max(widths) > LEAST_COLUMN:
        widest = max(range(len(widths)), key=widths.__getitem__)
        others = sorted(set(widths))[-2:]
        step = max(1, min(widths[widest] - others[0], sum(widths) - left) // 2)
        widths[widest] = max(widths[widest] - step, LEAST_COLUMN)
    return [max(columns, 1) for columns in widths]
