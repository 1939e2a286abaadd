"""A conversation on the screen: what is typed goes to a thread that answers, what it says becomes entries.

The voice of the chat on the screen. One thread answers messages and obeys commands one after the other; commands that
need not wait for an answer have a thread of their own.
"""

from __future__ import annotations

import queue
import shutil
import sys
import threading
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing, suppress
from typing import TYPE_CHECKING

from edgelm.errors import EdgeLMError
from edgelm_apps.commands import Command, Leave, commands_of, respond
from edgelm_apps.history import History
from edgelm_apps.terminal import keys
from edgelm_apps.terminal.captured import Captured
from edgelm_apps.terminal.code import Colours
from edgelm_apps.terminal.observer import Observer
from edgelm_apps.terminal.screen import Screen, print_lines
from edgelm_apps.terminal.status import SEGMENTS, Segment, Status
from edgelm_apps.terminal.view import Answer, Entry, Plain, View

if TYPE_CHECKING:
    from edgelm import Chunk
    from edgelm_apps.conversation import Conversation, Voice

LEAVING_S = 10.0
"""How long an answer that was stopped may take to end when the user leaves."""


class Talk:
    """One conversation on one screen. `name`: what the status line calls the model."""

    keys = keys.HELP

    def __init__(
        self,
        conversation: Conversation,
        name: str,
        colours: Colours,
        history: History,
        segments: Sequence[Segment] = SEGMENTS,
    ) -> None:
        self._conversation, self._model, self._colours = conversation, conversation.model, colours
        self.commands: Mapping[str, Command] = {
            "/mouse": Command(
                self._mouse,
                {"/mouse on|off": "let the wheel scroll; selecting text then needs Shift"},
                lambda: ("on", "off"),
                at_once=True,
            )
        }
        self._view = View()
        self._history = history
        values = {command: entry.values for command, entry in commands_of(self).items()}
        self._screen = Screen(self._view, self, segments, history, values)
        self._observer = Observer(self._model, name)
        self._typed: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._n_open = 0  # messages and commands that were typed and are not done
        self._counting = threading.Lock()
        self._stopping = self._warned = False
        self._broken: Exception | None = None  # a defect, for the thread that draws to raise once the terminal is back
        colours.room = self._has_room

    def run(self) -> int:
        """Talk until the user leaves; afterwards the whole conversation stands in the terminal."""
        worker = threading.Thread(target=self._work, name="edgelm-answers", daemon=True)
        with Captured(self.note) as captured:
            worker.start()
            try:
                self._screen.run(captured.terminal)
            finally:
                self._stop()
                self._typed.put(None)
                worker.join(LEAVING_S)
        with suppress(OSError):  # a terminal that was closed scrolls no more
            print_lines(self._view.every_line(_columns()), sys.stdout)
        if self._broken is not None:
            raise self._broken
        return 0

    # what a conversation says

    def say(self, text: str) -> None:
        self._add(Plain(text))

    def note(self, text: str) -> None:
        self._add(Plain(text, "class:note"))

    aside = note

    def fail(self, error: Exception) -> None:
        self._add(Plain(str(error), "class:error", "error: "))

    def show(self, chunks: Generator[Chunk, None, None]) -> None:
        """Put an answer into the view while it comes. Draws nothing: the screen's clock does."""
        answer: Answer | None = None
        with closing(chunks):
            for chunk in chunks:
                if answer is None:
                    answer = Answer(self._colours)
                    self._view.add(answer)
                answer.feed(chunk.text)
                self._observer.hears(chunk.usage)
                if self._stopping:
                    break
        if answer is not None:
            answer.end()

    # what a screen asks

    @property
    def busy(self) -> bool:
        return self._n_open > 0

    def send(self, text: str) -> None:
        """Answer a message, or obey a command, when its turn comes."""
        self._warned = False
        name, _, rest = text.strip().partition(" ")
        command = commands_of(self).get(name)
        self._count(1)
        if command is not None and command.at_once and self._n_open > 1:
            self._add(Plain(text, "class:user", "> ", apart=True))
            threading.Thread(target=self._obey, args=(command, rest.strip()), daemon=True).start()
        else:
            self._typed.put(text)

    def interrupt(self) -> bool:
        if self.busy and not self._stopping:
            self._stop()
            return True
        if self._warned or self.busy:
            return False
        self._warned = True
        self.note("Ctrl-C again, Ctrl-D or /exit leaves")
        return True

    def status(self, scrolled: bool) -> Status:
        return self._observer.status(max(self._n_open - 1, 0), scrolled)

    def look(self) -> None:
        for text in self._conversation.asides.take():
            self.aside(text)
        if self._history.trouble:
            self.note(self._history.trouble)
            self._history.trouble = ""

    # the threads behind

    def _work(self) -> None:
        while (text := self._typed.get()) is not None:
            self._stopping = False
            self._add(Plain(text, "class:user", "> ", apart=True))
            self._observer.begins("working" if text.lstrip().startswith("/") else "reading")
            self._guarded(lambda text=text: respond(self._conversation, text, self))  # type: ignore[misc]
            self._observer.begins("waiting")
            self._count(-1)
            self._screen.refresh()

    def _obey(self, command: Command, rest: str) -> None:
        def run() -> bool:
            try:
                command.run(self._conversation, rest, self)
            except Leave:
                return False
            return True

        self._guarded(run)
        self._count(-1)
        self._screen.refresh()

    def _guarded(self, run: Callable[[], bool]) -> None:
        try:
            if not run():
                self._screen.leave()
        except EdgeLMError as error:
            self.fail(error)
        except Exception as error:
            self._broken = error
            self._screen.leave()

    def _stop(self) -> None:
        """Stop what runs, and give up what waits."""
        self._stopping = self.busy
        while not self._typed.empty():
            self._typed.get()
            self._count(-1)
        self._model.cancel()

    def _count(self, n: int) -> None:
        with self._counting:
            self._n_open += n

    def _add(self, entry: Entry) -> None:
        self._view.add(entry)
        self._screen.refresh()

    def _mouse(self, conversation: Conversation, rest: str, voice: Voice) -> None:
        if rest in ("on", "off"):
            self._screen.mouse = rest == "on"
            voice.note("the wheel scrolls; select text with Shift" if self._screen.mouse else "the mouse selects text")
        else:
            voice.note("/mouse takes on or off")

    def _has_room(self, n_bytes: int) -> bool:
        status = self.status(scrolled=False)
        return status.rss_bytes + n_bytes < status.budget_bytes


def _columns() -> int:
    return shutil.get_terminal_size().columns
