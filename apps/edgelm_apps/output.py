"""How the command line speaks: answers and tables on stdout, everything else on stderr."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import sys
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from tqdm import tqdm

_LONG_ARRAY = 8


def note(text: str) -> None:
    """Print one line about the work to stderr."""
    click.echo(f"edgelm: {text}", err=True)


def print_error(text: str) -> None:
    """Print one sentence about a failure to stderr."""
    label = click.style("error:", fg="red", bold=True) if use_colour() else "error:"
    click.echo(f"edgelm: {label} {text}", err=True)


def print_dim(text: str) -> None:
    """Print one line that is there on the side to stderr."""
    click.echo(click.style(text, dim=True) if use_colour() else text, err=True)


class Asides:
    """Sentences that arrive from another thread; they are shown when the caller says so, not amid an answer."""

    def __init__(self, quiet: bool) -> None:
        self._quiet, self._waiting = quiet, deque[str]()

    def add(self, text: str) -> None:
        self._waiting.append(text)

    def take(self) -> Iterator[str]:
        """Yield what has arrived, once."""
        while self._waiting:
            text = self._waiting.popleft()
            if not self._quiet:
                yield text

    def show(self) -> None:
        for text in self.take():
            print_dim(text)


def use_colour() -> bool:
    """Colour only a terminal, and never against NO_COLOR."""
    return not os.environ.get("NO_COLOR") and sys.stderr.isatty()


def print_json(value: object) -> None:
    click.echo(json.dumps(plain(value), ensure_ascii=False, indent=2))


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print left-aligned columns, two spaces apart, the last one unpadded."""
    table = [tuple(header), *map(tuple, rows)]
    widths = [max(len(row[column]) for row in table) for column in range(len(header))]
    for row in table:
        line = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        click.echo(line.rstrip())


def plain(value: object) -> Any:
    """Return `value` as JSON can say it: records and mappings become objects, the unknown becomes text."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        value = value._asdict()
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(item) for item in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return str(value)


def brief(value: object) -> object:
    """Return `value`, or the length and the beginning of a long array such as a vocabulary."""
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)) and len(value) > _LONG_ARRAY:
        return {"length": len(value), "first": plain(list(value[:3]))}
    return plain(value)


def humanize(key: str, value: object) -> str:
    """Return one fact as text; the unit is in the name of the fact."""
    from edgelm.sizes import human

    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None:
        return "unknown"
    if isinstance(value, (int, float)):
        if key.endswith("_bytes"):
            return human(value)
        if key.endswith(("_bytes_per_s", "_bps")):
            return f"{human(value)}/s"
        if key.endswith("_s"):
            return f"{value:.3g} s"
        return f"{value:.4g}" if isinstance(value, float) else str(value)
    if isinstance(value, (list, tuple)):
        return ", ".join(str(item) for item in value) or "none"
    return str(value)


def print_facts(facts: Mapping[str, object], indent: str = "") -> None:
    """Print names and values, nested facts indented below their name."""
    width = max((len(key) for key, value in facts.items() if not isinstance(value, Mapping)), default=0)
    for key, value in facts.items():
        if isinstance(value, Mapping):
            click.echo(f"{indent}{key}:")
            print_facts(value, indent + "  ")
        else:
            click.echo(f"{indent}{key.ljust(width)}  {humanize(key, value)}")


class Percentage:
    """A percentage on one line of a terminal. Not tqdm: its 9 MB would stay and count against the budget."""

    def __init__(self, label: str, quiet: bool) -> None:
        room = shutil.get_terminal_size().columns - len(": 100 %") - 1
        self._label = label if len(label) <= room else label[: max(room - 1, 0)] + "…"
        self._shown = -1
        self._shows = not quiet and sys.stderr.isatty()

    def show(self, done: int, total: int) -> None:
        percent = 100 * done // total if total else 100
        if self._shows and percent != self._shown:
            self._shown = percent
            sys.stderr.write(f"\r{self._label}: {percent} %")
            sys.stderr.flush()

    def __enter__(self) -> Percentage:
        return self

    def __exit__(self, *error: object) -> None:
        if self._shown >= 0:
            sys.stderr.write("\r" + " " * (len(self._label) + 7) + "\r")
            sys.stderr.flush()


class PullDisplay:
    """Shows a pull: notices as lines, bytes as a bar; the bar only on a terminal, nothing at all when quiet."""

    def __init__(self, quiet: bool) -> None:
        self._quiet = quiet
        self._bar: tqdm[Any] | None = None
        self.shows_progress = not quiet and sys.stderr.isatty()

    def notice(self, text: str) -> None:
        if not self._quiet:
            note(text)

    def progress(self, label: str, done_bytes: int, total_bytes: int) -> None:
        if not self.shows_progress:
            return
        if self._bar is None:
            from tqdm import tqdm

            self._bar = tqdm(desc=label, total=total_bytes, unit="B", unit_scale=True, file=sys.stderr, leave=False)
        self._bar.update(done_bytes - self._bar.n)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
