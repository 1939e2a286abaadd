"""One chat with one model, and what is told around its answers.

Knows no terminal: a `Voice` shows what is said.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import closing, suppress
from typing import TYPE_CHECKING, Any, Protocol

from edgelm_apps.engine import ask, budget_lines, status_line

if TYPE_CHECKING:
    from edgelm import Chunk, Model, Usage
    from edgelm.chat import Overflow
    from edgelm_apps.commands import Command
    from edgelm_apps.output import Asides

RETRY_TEMPERATURE = 0.8


class Voice(Protocol):
    """How a chat speaks: in lines, or on a screen."""

    keys: str
    """What `/help` says of keys."""
    commands: Mapping[str, Command]
    """Commands that only this voice has."""

    def say(self, text: str) -> None:
        """Show what a command was asked for."""

    def note(self, text: str) -> None:
        """Show one line about the work."""

    def aside(self, text: str) -> None:
        """Show one line that is there on the side."""

    def show(self, chunks: Generator[Chunk, None, None]) -> None:
        """Show an answer while it comes; to close `chunks` early stops it."""


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
        status: Callable[[Usage], str] = status_line,
    ) -> None:
        self.model, self.system, self.overflow, self.sampling = model, system, overflow, sampling
        self.asides, self.keep, self.status = asides, keep, status
        self.chat = model.chat(system, overflow=overflow, keep=keep)
        self.usage: Usage | None = None
        self.shows_status = False
        self._told = model.notes

    def restart(self, system: str | None) -> None:
        self.system = system
        self.chat = self.model.chat(system, overflow=self.overflow, keep=self.keep)

    def set_budget(self, size: str) -> list[str]:
        """Go over to another budget; return what to say."""
        plan = self.model.set_budget(size)
        self._told = self.model.notes
        return budget_lines(self.model, plan)

    def answer(self, text: str, voice: Voice, **other: Any) -> None:
        """Let the voice show the answer to `text`, then say how it ended and what the model has noted meanwhile."""
        self._reason: str | None = None
        voice.show(self._chunks(text, self.sampling | other))
        if self._reason in (None, "cancelled"):
            voice.note("stopped")
        elif self._reason == "length":
            voice.note("the answer reached its length limit")
        for line in self.model.notes[len(self._told) :]:
            voice.note(line)
        self._told = self.model.notes
        if self.shows_status and self.usage is not None:
            voice.aside(self.status(self.usage))

    def retry(self, voice: Voice, temperature: float | None) -> None:
        """Answer the last message again, in other words; an answer that fails leaves the old one."""
        messages = self.chat.messages
        if [one["role"] for one in messages[-2:]] != ["user", "assistant"]:
            voice.note("there is no answer yet that could be tried again")
            return
        if temperature is None and not self.sampling.get("temperature"):
            temperature = RETRY_TEMPERATURE
            voice.note(f"once more, with a temperature of {temperature}: at 0 the same answer would come")
        other: dict[str, Any] = {"seed": None}  # the same seed would draw the same answer
        if temperature is not None:
            other["temperature"] = temperature
        before = list(messages)
        del messages[-2:]
        try:
            self.answer(str(before[-2]["content"]), voice, **other)
        finally:
            if len(messages) < len(before) - 1:
                messages[:] = before

    def _chunks(self, text: str, sampling: dict[str, Any]) -> Generator[Chunk, None, None]:
        from edgelm.errors import Cancelled

        with suppress(Cancelled), closing(ask(self.chat, text, sampling)) as chunks:
            for chunk in chunks:
                self.usage, self._reason = chunk.usage, chunk.finish_reason
                yield chunk
