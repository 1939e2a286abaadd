"""Turn formats for files without a chat template, chosen by the special tokens that the vocabulary has.

Plain Python, so that such files do not cost the memory of a template engine. Knows formats; guards nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Messages = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Fallback:
    """A turn format: how to render it, and the texts that end an answer where no token does."""

    name: str
    marker: str
    """The special token that shows that a model knows this format."""
    render: Callable[[Messages, bool], str]
    stops: tuple[str, ...] = ()


def with_system_folded(messages: Messages) -> list[dict[str, Any]]:
    """Return the messages with the system texts put before the first user's text."""
    system = "\n\n".join(message["content"] for message in messages if message["role"] == "system")
    rest = [dict(message) for message in messages if message["role"] != "system"]
    if not system:
        return rest
    for message in rest:
        if message["role"] == "user":
            message["content"] = f"{system}\n\n{message['content']}"
            return rest
    return [{"role": "user", "content": system}, *rest]


def _chatml(messages: Messages, add_generation_prompt: bool) -> str:
    turns = [f"<|im_start|>{message['role']}\n{message['content']}<|im_end|>\n" for message in messages]
    return "".join(turns) + ("<|im_start|>assistant\n" if add_generation_prompt else "")


def _gemma(messages: Messages, add_generation_prompt: bool) -> str:
    turns = []
    for message in with_system_folded(messages):
        role = "model" if message["role"] == "assistant" else "user"
        turns.append(f"<start_of_turn>{role}\n{message['content'].strip()}<end_of_turn>\n")
    return "".join(turns) + ("<start_of_turn>model\n" if add_generation_prompt else "")


def _llama3(messages: Messages, add_generation_prompt: bool) -> str:
    head = "<|start_header_id|>{}<|end_header_id|>\n\n".format
    turns = [f"{head(message['role'])}{message['content'].strip()}<|eot_id|>" for message in messages]
    return "".join(turns) + (head("assistant") if add_generation_prompt else "")


def _plain(messages: Messages, add_generation_prompt: bool) -> str:
    names = {"system": "System", "assistant": "Assistant"}
    turns = [f"{names.get(message['role'], 'User')}: {message['content'].strip()}\n" for message in messages]
    return "".join(turns) + ("Assistant:" if add_generation_prompt else "")


PLAIN = Fallback("plain", "", _plain, stops=("\nUser:",))
FALLBACKS = (
    Fallback("chatml", "<|im_start|>", _chatml),
    Fallback("gemma", "<start_of_turn>", _gemma),
    Fallback("llama3", "<|start_header_id|>", _llama3),
)
