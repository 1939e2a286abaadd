"""The line where a message is written: its buffer, the history behind it, completion of slash commands."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from prompt_toolkit.buffer import Buffer
from prompt_toolkit.completion import CompleteEvent, Completer, Completion
from prompt_toolkit.document import Document
from prompt_toolkit.history import History as Entries

from edgelm_apps.history import History

Values = Mapping[str, Callable[[], Sequence[str]]]
"""Commands by their names, each with what its argument can be."""


class Kept(Entries):
    """The kept history, as prompt_toolkit asks for it."""

    def __init__(self, history: History) -> None:
        super().__init__()
        self._history = history

    def load_history_strings(self) -> Iterable[str]:
        return reversed(self._history.entries)

    def store_string(self, string: str) -> None:
        self._history.add(string)


class Commands(Completer):
    """Completes names of commands, and what can follow them."""

    def __init__(self, values: Values) -> None:
        self._values = values

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
        text = document.text_before_cursor
        if not text.startswith("/") or "\n" in document.text:
            return
        name, blank, rest = text.partition(" ")
        found = self._values.get(name, tuple)() if blank else self._values
        start = rest if blank else name
        yield from (Completion(one, -len(start)) for one in found if one.startswith(start) and one != start)


def editor(history: History, values: Values) -> Buffer:
    return Buffer(multiline=True, history=Kept(history), completer=Commands(values), complete_while_typing=True)
