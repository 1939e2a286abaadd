"""Lines of styled text, and how they fit into a width. Knows nothing of Markdown or of terminals.

A fragment is a style and a text, as prompt_toolkit has them; a line is a list of fragments without line breaks.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence

Fragment = tuple[str, str]
Line = list[Fragment]

_UNSHOWN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
_WORDS = re.compile(r"\n| +|[^ \n]+")
TAB = 4


def shown(text: str) -> str:
    """Return `text` without what would move the cursor, ring, or turn the direction of writing."""
    return _UNSHOWN.sub("", text).expandtabs(TAB)


def width_of(text: str) -> int:
    """Return the columns that `text` takes where each letter is drawn for itself, as prompt_toolkit does."""
    if text.isascii():
        return len(text)
    from wcwidth import wcwidth

    # not wcswidth: it counts an emoji that is joined of several as one, which would be cut off at the right edge
    return sum(max(wcwidth(letter), 0) for letter in text)


def line_width(line: Iterable[Fragment]) -> int:
    return sum(width_of(text) for _, text in line)


def wrapped(
    fragments: Iterable[Fragment], width: int, first: Line | None = None, rest: Line | None = None
) -> list[Line]:
    """Break text into lines of at most `width` columns, between words where that works.

    Line feeds in it begin lines. `first` comes before the first line, `rest` (or `first`) before the others.
    """
    first = first or []
    rest = first if rest is None else rest
    lines: list[Line] = []
    for number, words in enumerate(_logical_lines(fragments)):
        lines += _filled(words, width, rest if number else first, rest)
    return lines


def _filled(words: Iterable[Line], width: int, first: Line, rest: Line) -> list[Line]:
    """Fill lines with words; blanks between them are words too, and go where a line is broken."""
    lines = [list(first)]
    room = max(width - line_width(rest), 1)
    left = max(width - line_width(first), 1)
    full, blank = left, None
    for word in words:
        if word[0][1].isspace():
            blank = word[0]
            continue
        columns = line_width(word)
        spaces = len(blank[1]) if blank else 0
        if spaces + columns > left and left < full:
            lines.append(list(rest))
            left = full = room
        elif blank is not None and spaces + min(columns, 2) <= left:  # else a wide letter would not fit behind it
            lines[-1].append(blank)
            left -= spaces
        blank = None
        for number, line in enumerate(broken(word, left, room)):
            if number:
                lines.append(list(rest))
                left = full = room
            lines[-1] += line
            left -= line_width(line)
    return [_merged(line) for line in lines]


def cut(text: str, first: int, rest: int) -> Iterator[str]:
    """Yield `text` in parts of at most so many columns, the first and the others."""
    if width_of(text) <= first:
        yield text
        return
    part, left = "", first
    for letter in text:
        columns = width_of(letter)
        if columns > left and part:
            yield part
            part, left = "", rest
        part += letter
        left -= columns
    yield part


def broken(line: Sequence[Fragment], first: int, rest: int) -> list[Line]:
    """Break a line wherever the width ends, after `first` columns and then after every `rest`."""
    if line_width(line) <= first:
        return [list(line)]
    lines: list[Line] = [[]]
    left = first
    for style, text in line:
        for number, part in enumerate(cut(text, left, rest)):
            if number or (width_of(part) > left and lines[-1]):
                lines.append([])
                left = rest
            lines[-1].append((style, part))
            left -= width_of(part)
    return lines


def _logical_lines(fragments: Iterable[Fragment]) -> Iterator[list[Line]]:
    """Yield each line as words and the blanks between them; a word may have several styles."""
    words: list[Line] = []
    for style, text in fragments:
        for part in _WORDS.findall(text):
            if part == "\n":
                yield words
                words = []
            elif words and words[-1][-1][1].isspace() == part.isspace():
                words[-1].append((style, part))
            else:
                words.append([(style, part)])
    yield words


def _merged(line: Line) -> Line:
    """Join neighbours of one style: a screen draws few long texts sooner than many short ones."""
    merged: Line = []
    for style, text in line:
        if merged and merged[-1][0] == style:
            merged[-1] = (style, merged[-1][1] + text)
        else:
            merged.append((style, text))
    return merged
