"""The conversation in lines: reads them, obeys slash commands, streams answers.

Works on a terminal (line editing, history) and on a plain pipe (no prompt, ends with the input).
"""

from __future__ import annotations

import sys
from collections.abc import Generator, Mapping
from contextlib import closing, suppress
from typing import TYPE_CHECKING

import click

from edgelm_apps.commands import respond
from edgelm_apps.engine import interruptible
from edgelm_apps.history import MOST_LINES, History
from edgelm_apps.output import note, print_dim, print_error

if TYPE_CHECKING:
    from edgelm import Chunk, Model
    from edgelm_apps.commands import Command
    from edgelm_apps.conversation import Conversation

PROMPT, CONTINUED = ">>> ", "... "
QUOTES = '"""'


class Lines:
    """Lines typed on a terminal or read from a pipe. `read` raises EOFError at the end of the input."""

    def __init__(self, history: History | None) -> None:
        self.interactive = history is not None
        self._history = history
        if history is not None:
            _remember(history.entries)

    def read(self, prompt: str) -> str:
        if self._history is not None:
            line = input(prompt)
            self._history.add_line(line)
            return line
        line = sys.stdin.readline()
        if not line:
            raise EOFError
        return line.removesuffix("\n").removesuffix("\r")

    def close(self) -> None:
        if self._history is not None and self._history.trouble:
            note(self._history.trouble)


class Printer:
    """The voice of a chat in lines: answers on stdout, notes on stderr."""

    commands: Mapping[str, Command] = {}
    keys = (
        f"A line that ends with \\ goes on in the next; {QUOTES} begins and ends a text of several lines.\n"
        "Ctrl-C stops an answer."
    )

    def __init__(self, model: Model) -> None:
        self._model = model

    def say(self, text: str) -> None:
        click.echo(text)

    def note(self, text: str) -> None:
        note(text)

    def aside(self, text: str) -> None:
        print_dim(text)

    def show(self, chunks: Generator[Chunk, None, None]) -> None:
        """Stream the answer to stdout; an interrupt stops it."""
        with interruptible(self._model), closing(chunks):
            for chunk in chunks:
                click.echo(chunk.text, nl=False)
        click.echo()


def talk(conversation: Conversation, source: Lines) -> int:
    """Run the conversation until the input ends or the user leaves; return the exit code."""
    from edgelm.errors import EdgeLMError

    voice = Printer(conversation.model)
    interrupts = 0
    while True:
        conversation.asides.show()
        try:
            text = read_message(source)
        except EOFError:
            if source.interactive:
                click.echo()
            return 0
        except KeyboardInterrupt:
            click.echo()
            interrupts += 1
            if interrupts > 1 or not source.interactive:
                return 0 if source.interactive else 130
            note("Ctrl-C again, Ctrl-D or /exit leaves")
            continue
        interrupts = 0
        try:
            if not respond(conversation, text, voice):
                return 0
        except EdgeLMError as error:
            if not source.interactive:
                raise
            print_error(str(error))
        except KeyboardInterrupt:
            click.echo()
            note("stopped")


def read_message(source: Lines) -> str:
    """Return the next message: one line, or several joined by a trailing backslash or within triple quotes."""
    line = source.read(PROMPT)
    if line.lstrip().startswith(QUOTES):
        return _quoted(source, line.lstrip().removeprefix(QUOTES))
    lines = []
    while line.endswith("\\"):
        lines.append(line[:-1])
        try:
            line = source.read(CONTINUED)
        except EOFError:
            return "\n".join(lines)
    return "\n".join([*lines, line])


def _quoted(source: Lines, line: str) -> str:
    lines = []
    while not line.rstrip().endswith(QUOTES):
        lines.append(line)
        try:
            line = source.read(CONTINUED)
        except EOFError:
            return "\n".join(lines).strip("\n")
    return "\n".join([*lines, line.rstrip().removesuffix(QUOTES)]).strip("\n")


def _remember(entries: list[str]) -> None:
    """Give the line editor what was typed before; messages of several lines as their lines."""
    with suppress(ImportError):  # Windows: the console edits lines itself
        import readline

        readline.set_history_length(MOST_LINES)
        for entry in entries:
            *parts, last = entry.split("\n")
            for line in [*(f"{part}\\" for part in parts), last]:
                readline.add_history(line)
