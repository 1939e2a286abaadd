"""The model that a plug-in of another program holds: loaded when it is first asked, and kept for the next question.

One model at a time, since the budget is the whole process's. A question that goes on with the conversation before it
goes on in the same chat, so that nothing is computed twice. Knows no program that it is plugged into.
"""

from __future__ import annotations

import asyncio
import atexit
import sys
import threading
import warnings
from collections.abc import AsyncGenerator, Generator, Mapping, Sequence
from contextlib import aclosing, closing, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from edgelm.errors import ConfigError, DownloadError

if TYPE_CHECKING:
    from edgelm import Chat, Chunk, Model

ENGINE = ("memory", "backend", "threads", "context", "kv", "draft")
"""Options of `edgelm.load` that plug-ins take; the others are of answers."""
_NAMED, _NESTED = {"properties", "$defs", "definitions"}, {"items", "prefixItems", "anyOf", "oneOf"}
_OPEN = {"additionalProperties", "patternProperties", "allOf", "$ref"}
"""What says itself which other properties an object may have, or may be said elsewhere."""
_FIELDS = ("role", "content", "tool_calls")
"""What makes a message of an answer; where it came from may have added more."""


class Question(NamedTuple):
    """What a plug-in asks: all messages of the conversation, tools, options of the answer.

    `forced`: the answer has to be a call of one of the tools. `kept`: a file that the conversation is read from, and
    written to when the model is let go of.
    """

    messages: Sequence[Mapping[str, Any]]
    options: dict[str, Any]
    tools: Sequence[Mapping[str, Any]] = ()
    forced: bool = False
    kept: Path | None = None


class Held:
    """A loaded model, and the chat that it was last asked in."""

    def __init__(self, name: str, model: Model) -> None:
        self.name, self.model = name, model
        self.users = 0
        self._last: Chat | None = None
        self._tools: list[Mapping[str, Any]] = []
        self._kept: Path | None = None
        self._lock = threading.Lock()

    def chat(self, question: Question) -> tuple[Chat, list[Mapping[str, Any]]]:
        """Return the chat that a question goes on with, or a new one, and what of its messages is new there."""
        messages, tools = list(question.messages), list(question.tools)
        with self._lock:
            chat, self._last = self._last, None
            goes_on = chat is not None and tools == self._tools
            if chat is None and question.kept is not None and question.kept.exists():
                chat, goes_on = self.model.chat(tools=tools), True
                with suppress(ConfigError):  # one that cannot be read is computed again
                    chat.load(question.kept)
            self._tools, self._kept = tools, question.kept
        if chat is not None and goes_on and _begins(messages, chat.messages):
            return chat, messages[len(chat.messages) :]
        with warnings.catch_warnings():
            if question.forced:  # the model is kept to a call, whatever its template leaves out
                from edgelm import ToolsIgnored

                warnings.simplefilter("ignore", ToolsIgnored)
            return self.model.chat(tools=tools), messages

    def answered(self, chat: Chat) -> None:
        """Remember the chat of an answer for the next question."""
        with self._lock:
            self._last = chat

    def close(self) -> None:
        """Keep the conversation, if its question said so, and give the memory back."""
        if self._last is not None and self._kept is not None:
            for other in self._kept.parent.glob("*"):  # one is kept: the one that was asked last
                if not other.name.startswith(self._kept.name):
                    other.unlink(missing_ok=True)
            self._last.save(self._kept)
        self.model.close()


_lock = threading.Lock()
_held: Held | None = None
_key: tuple[str, dict[str, Any]] | None = None


def answer(name: str, engine: dict[str, Any], question: Question) -> Generator[Chunk, None, None]:
    """Yield the answer of a model (a path or a name) loaded with options of `edgelm.load`. Closing this stops it."""
    held = take(name, engine)
    try:
        chat, new = held.chat(question)
        with closing(chat.answer(new, **_options(question))) as chunks:
            yield from chunks
        held.answered(chat)
    finally:
        give_back(held)


async def aanswer(name: str, engine: dict[str, Any], question: Question) -> AsyncGenerator[Chunk, None]:
    """Like `answer`, for asyncio: the model is loaded and computes in threads."""
    held = await asyncio.to_thread(take, name, engine)
    try:
        chat, new = await asyncio.to_thread(held.chat, question)
        async with aclosing(chat.aanswer(new, **_options(question))) as chunks:
            async for chunk in chunks:
                yield chunk
        held.answered(chat)
    finally:
        give_back(held)


def take(name: str, engine: dict[str, Any]) -> Held:
    """Return this model loaded with these options, in use until `give_back`.

    Raises `ConfigError` where another one is still in use, and what `edgelm.load` raises; a name that is not on this
    machine is pulled.
    """
    global _held, _key
    with _lock:
        if _held is None or _key != (name, engine):
            if _held is not None and _held.users:
                raise ConfigError(
                    f"{_held.name} is still answering, and one model is loaded at a time; "
                    f"read that answer to its end before you ask {name}"
                )
            _let_go()
            _held, _key = Held(name, _load(name, engine)), (name, dict(engine))
        _held.users += 1
        return _held


def give_back(held: Held) -> None:
    """Say that a use of the model has ended; it stays loaded."""
    with _lock:
        held.users -= 1


def let_go() -> None:
    """Give the memory of the held model back."""
    with _lock:
        _let_go()


def _let_go() -> None:
    global _held, _key
    held, _held, _key = _held, None, None
    if held is not None:
        held.close()


atexit.register(let_go)


def _load(name: str, engine: dict[str, Any]) -> Model:
    from edgelm_apps.engine import find_draft, find_model, open_model

    quiet = not sys.stderr.isatty()
    engine = dict(engine)
    try:
        path = find_model(name, offline=False, quiet=False)
        find_draft(engine, offline=False, quiet=False)
    except click.exceptions.Exit as error:  # pulling is a child's work, which has said why it failed
        raise DownloadError(f"{name} could not be pulled; try `edgelm pull {name}`") from error
    return open_model(path, engine, quiet=quiet)


def _options(question: Question) -> dict[str, Any]:
    """Return the options of the answer; a forced call is one in the form of a call."""
    if not question.forced:
        return dict(question.options)
    from edgelm import call_schema

    tools = [{**tool, "parameters": closed(tool.get("parameters", {}))} for tool in question.tools]
    return {**question.options, "json_schema": call_schema(tools)}


def closed(schema: Any) -> Any:
    """Return a JSON schema whose objects have no properties but those that are named, where it leaves that open.

    It is what people mean who write a schema by hand or as a class, and small models fill what is open with noise.
    """
    if isinstance(schema, list):
        return [closed(one) for one in schema]
    if not isinstance(schema, Mapping):
        return schema
    found = dict(schema)
    for key in found.keys() & _NAMED:
        found[key] = {name: closed(one) for name, one in found[key].items()}
    for key in found.keys() & _NESTED:
        found[key] = closed(found[key])
    if "properties" in found and not found.keys() & _OPEN:
        found["additionalProperties"] = False
    return found


def _begins(messages: Sequence[Mapping[str, Any]], said: Sequence[Mapping[str, Any]]) -> bool:
    """Return whether `messages` go on after what was said."""
    return 0 < len(said) < len(messages) and all(
        all(one.get(name) == other.get(name) for name in _FIELDS) for one, other in zip(messages, said, strict=False)
    )
