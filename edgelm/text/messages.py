"""Check chat messages and keep their texts from reading like special tokens.

Characters that would let a text of the user's form a special token, alone or with the template's words beside it,
are exchanged for noncharacters while the template runs, and changed back after the prompt has been cut at its special
tokens. Knows messages and texts of tokens; knows no template language.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

from edgelm.errors import ConfigError

ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython")
Message = Mapping[str, Any]

_NONCHARACTERS = (
    *range(0xFDD0, 0xFDF0),
    *(plane << 16 | low for plane in range(17) for low in (0xFFFE, 0xFFFF)),
    *range(0x10F000, 0x10FFFE),  # private use: for vocabularies whose special tokens begin with many characters
)
_STAND_INS = frozenset(map(chr, _NONCHARACTERS))
_MAX_EDGE_CHARS = 64


def checked_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Return copies of `messages`, contents as one text each; raise `ConfigError` for what is not a chat."""
    if isinstance(messages, (str, bytes, Mapping)) or not messages:
        raise ConfigError("messages must be a list of at least one {'role': ..., 'content': ...}")
    return [_checked(message, number) for number, message in enumerate(messages, start=1)]


def _checked(message: Message, number: int) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise ConfigError(f"message {number} is {type(message).__name__}, not {{'role': ..., 'content': ...}}")
    role = message.get("role")
    if role not in ROLES:
        raise ConfigError(f"message {number} has the role {role!r} (known: {', '.join(ROLES)})")
    content = message.get("content")
    if isinstance(content, Sequence) and not isinstance(content, (str, bytes)):
        content = "".join(_part_text(part, number) for part in content)
    elif content is None and message.get("tool_calls"):
        content = ""
    if not isinstance(content, str):
        raise ConfigError(f"message {number} ({role}) has no text: its content is {type(content).__name__}, not str")
    told = {**message, "role": "system" if role == "developer" else role, "content": content}
    if message.get("tool_calls"):
        told["tool_calls"] = _checked_calls(message["tool_calls"], number)
    return told


def _checked_calls(calls: Any, number: int) -> list[dict[str, Any]]:
    """Return calls as `{"function": {"name", "arguments"}}`, arguments as an object also if they came as its text."""
    found = []
    for call in calls if isinstance(calls, Sequence) else [calls]:
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise ConfigError(
                f"message {number} has tool_calls that are none; "
                "give [{'function': {'name': ..., 'arguments': {...}}}, ...]"
            )
        arguments = function.get("arguments") or {}
        if isinstance(arguments, str):
            with suppress(ValueError):
                arguments = json.loads(arguments)
        whole = call if "function" in call else {}
        found.append({"type": "function", **whole, "function": {**function, "arguments": arguments}})
    return found


def _part_text(part: Any, number: int) -> str:
    if isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str):
        text: str = part["text"]
        return text
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    raise ConfigError(f"message {number} has a part of type {kind!r}: only text can be given to this model")


class _Guarded(str):
    """A text whose stand-ins also show where a template writes the Python of what holds it, as SmolLM3's does."""

    __slots__ = ()

    def __repr__(self) -> str:
        text = super().__repr__()
        for char in set(filter(_STAND_INS.__contains__, self)):
            text = text.replace(repr(char)[1:-1], char)
        return text


class Guard:
    """Exchanges the dangerous characters of texts, each always for the same noncharacter.

    `specials_in(text)` gives the special texts that occur in a text; `all_specials` holds all of them, joined by and
    enclosed in NULs; `texts` are all texts of the request, whose own noncharacters are not used.
    """

    def __init__(self, specials_in: Callable[[str], Sequence[str]], all_specials: str, texts: Sequence[str]) -> None:
        self._specials_in, self._all = specials_in, all_specials
        taken = set().union(*map(set, texts)) if texts else set()
        self._free = (point for point in _NONCHARACTERS if chr(point) not in taken)
        self._stand_ins: dict[str, str] = {}

    @property
    def originals(self) -> dict[int, str]:
        """The characters that noncharacters stand for, by code point."""
        return {ord(stand_in): char for char, stand_in in self._stand_ins.items()}

    def guard(self, value: Any) -> Any:
        """Return `value` with every text in it guarded; keys stay as they are."""
        if isinstance(value, str):
            return _Guarded(self._text(value))
        if isinstance(value, Mapping):
            return {key: self.guard(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.guard(item) for item in value]
        return value

    def _text(self, text: str) -> str:
        for special in self._specials_in(text):
            at = next((index for index, char in enumerate(special) if not char.isspace()), 0)
            text = text.replace(special, special[:at] + self._stand_in(special[at]) + special[at + 1 :])
        return self._edges(text)

    def _edges(self, text: str) -> str:
        """Guard the ends of a text that could complete a special token which the template began, or the reverse."""
        core = text.strip()
        if not core:
            return text
        start = text.index(core)
        end = start + len(core)
        inside = len(core) <= _MAX_EDGE_CHARS and core in self._all
        lengths = range(1, min(len(core), _MAX_EDGE_CHARS) + 1)
        if inside or any("\0" + core[-n:] in self._all for n in lengths):
            text = text[: end - 1] + self._stand_in(text[end - 1]) + text[end:]
        if inside or any(core[:n] + "\0" in self._all for n in lengths):
            text = text[:start] + self._stand_in(text[start]) + text[start + 1 :]
        return text

    def _stand_in(self, char: str) -> str:
        if ord(char) in self.originals:
            return char
        if char not in self._stand_ins:
            self._stand_ins[char] = chr(next(self._free))
        return self._stand_ins[char]


def texts_of(value: Any) -> Iterator[str]:
    """Yield every text in `value`, keys too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from texts_of(key)
            yield from texts_of(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from texts_of(item)
