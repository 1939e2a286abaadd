"""The conversation loop: reads lines, obeys slash commands, streams answers.

Works on a terminal (line editing, history) and on a plain pipe (no prompt, ends with the input).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgelm_apps.engine import ask, budget_lines, interruptible, statistics_text, status_line
from edgelm_apps.output import Asides, note, print_dim, print_error

if TYPE_CHECKING:
    from edgelm import Model, Usage
    from edgelm.chat import Overflow

PROMPT, CONTINUED = ">>> ", "... "
QUOTES = '"""'
HISTORY_LINES = 1000
HELP = f"""\
/help          this list
/system TEXT   start over with TEXT as the system message; /system alone shows it
/save NAME     keep this conversation, with what is computed of it; /load NAME goes on with it
/stats         tokens, speed, time and memory of the last answer
/stats on|off  show a line of it after each answer
/clear         forget the conversation
/budget SIZE   go over to another memory budget, such as 200MB; the conversation goes on
/exit          leave (Ctrl-D does it too)
A line that ends with \\ goes on in the next; {QUOTES} begins and ends a text of several lines.
Ctrl-C stops an answer."""


class Conversation:
    """One chat with one model, and what the slash commands need to know about it."""

    def __init__(
        self,
        model: Model,
        system: str | None,
        overflow: Overflow,
        sampling: dict[str, Any],
        asides: Asides,
        keep: bool = False,
    ) -> None:
        self.model, self.system, self.overflow, self.sampling = model, system, overflow, sampling
        self.asides, self.keep = asides, keep
        self.chat = model.chat(system, overflow=overflow, keep=keep)
        self.usage: Usage | None = None
        self.shows_status = False

    def restart(self, system: str | None) -> None:
        self.system = system
        self.chat = self.model.chat(system, overflow=self.overflow, keep=self.keep)

    def answer(self, text: str) -> None:
        """Stream the answer to stdout; an interrupt stops it and is said so."""
        from edgelm.errors import Cancelled

        reason: str | None = None
        told = self.model.notes
        with interruptible(self.model), suppress(Cancelled), closing(ask(self.chat, text, self.sampling)) as chunks:
            reason = "cancelled"
            for chunk in chunks:
                click.echo(chunk.text, nl=False)
                self.usage, reason = chunk.usage, chunk.finish_reason
        click.echo()
        if reason == "cancelled":
            note("stopped")
        elif reason == "length":
            note("the answer reached its length limit")
        for line in self.model.notes[len(told) :]:
            note(line)
        if self.shows_status and self.usage is not None:
            print_dim(status_line(self.usage))


class Lines:
    """Lines typed on a terminal or read from a pipe. `read` raises EOFError at the end of the input."""

    def __init__(self, interactive: bool) -> None:
        self.interactive = interactive

    def read(self, prompt: str) -> str:
        if self.interactive:
            return input(prompt)
        line = sys.stdin.readline()
        if not line:
            raise EOFError
        return line.removesuffix("\n").removesuffix("\r")


@contextmanager
def lines_from_stdin(greet: bool) -> Iterator[Lines]:
    """Yield the source of lines; on a terminal with line editing and a history that is kept."""
    interactive = sys.stdin.isatty() and sys.stdout.isatty()
    if not interactive:
        yield Lines(interactive=False)
        return
    if greet:
        note("type a message; /help lists the commands, /exit leaves")
    save = _open_history()
    try:
        yield Lines(interactive=True)
    finally:
        save()


def talk(conversation: Conversation, source: Lines) -> int:
    """Run the conversation until the input ends or the user leaves; return the exit code."""
    from edgelm.errors import EdgeLMError

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
            if not respond(conversation, text):
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


def respond(conversation: Conversation, text: str) -> bool:
    """Obey a slash command or answer a message; return False when the user leaves."""
    command, _, rest = text.strip().partition(" ")
    if not command.startswith("/"):
        if text.strip():
            conversation.answer(text)
        return True
    match command:
        case "/exit" | "/quit":
            return False
        case "/help":
            click.echo(HELP)
        case "/clear":
            conversation.chat.clear()
            note("the conversation is forgotten")
        case "/system" if rest.strip():
            conversation.restart(rest.strip())
            note("a new conversation begins with this system message")
        case "/system":
            note(f"system message: {conversation.system}" if conversation.system else "there is no system message")
        case "/budget" if rest.strip():
            plan = conversation.model.set_budget(rest.strip())
            for line in budget_lines(conversation.model, plan):
                note(line)
        case "/budget":
            click.echo(str(conversation.model.plan))
        case "/save" if rest.strip():
            path = chats_folder() / f"{plain_name(rest)}.json"
            told = conversation.chat.save(path)
            note(f"saved in {path}" + (f"; {told}" if told else ""))
        case "/load" if rest.strip():
            told = conversation.chat.load(chats_folder() / f"{plain_name(rest)}.json")
            n_messages = len(conversation.chat.messages)
            note(f"{n_messages} messages are back; {told or 'nothing has to be computed again'}")
        case "/save" | "/load":
            names = sorted(path.stem for path in chats_folder().glob("*.json"))
            note(f"{command} takes a name" + (f"; saved are {', '.join(names)}" if names else ""))
        case "/stats" if rest.strip() in ("on", "off"):
            conversation.shows_status = rest.strip() == "on"
            note("a line of statistics follows each answer" if conversation.shows_status else "no more statistics")
        case "/stats" if rest.strip():
            note(f"/stats takes on, off or nothing, not {rest.strip()!r}")
        case "/stats":
            click.echo(statistics_text(conversation.usage) if conversation.usage else "no answer yet")
        case _:
            note(f"unknown command {command}; /help lists the commands")
    return True


def plain_name(name: str) -> str:
    """Return a name that is no path. Raises `ConfigError` for one that says nothing."""
    from edgelm.errors import ConfigError

    kept = "".join(letter for letter in name.strip() if letter.isalnum() or letter in "-_. ").strip(". ")
    if not kept:
        raise ConfigError(f"{name.strip()!r} is no name; use letters and digits")
    return kept


def chats_folder() -> Path:
    """Return where saved conversations are: the user's data folder."""
    from platformdirs import user_data_path

    return user_data_path("edgelm", appauthor=False) / "chats"


def history_file() -> Path:
    """Return where typed lines are kept: the user's state folder."""
    from platformdirs import user_state_path

    return user_state_path("edgelm", appauthor=False) / "chat_history"


def _open_history() -> Any:
    try:
        import readline
    except ImportError:  # Windows: the console edits lines itself
        return lambda: None
    path = history_file()
    with suppress(OSError):
        readline.read_history_file(path)
    readline.set_history_length(HISTORY_LINES)

    def save() -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            readline.write_history_file(path)
            os.chmod(path, 0o600)  # what people say to a model is theirs
        except OSError as error:
            note(f"the history could not be saved in {path}: {error.strerror}")

    return save
