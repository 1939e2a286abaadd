"""Tell a chat with calls of tools to a template that takes them in a way of its own, or in none.

Knows checked messages, and of a template only its text: which way it takes is for the caller to try.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import takewhile
from typing import Any

Messages = Sequence[Mapping[str, Any]]
SPELLED = "this model's template has no calls of tools: they were put as text"
BY_USER = (
    "this model's template has no calls of tools: they were put as text, and what the tools returned as the user's"
)


def has_calls(messages: Messages) -> bool:
    """Say whether a tool was called or has answered."""
    return any(message["role"] == "tool" or message.get("tool_calls") for message in messages)


def readings(messages: Messages, template: str) -> Iterator[tuple[list[dict[str, Any]], str | None]]:
    """Yield the messages in the ways in which templates take calls, the usual one first, and what to say of it."""
    usual = _with_ids(messages)
    yield usual, None
    if any(len(_calls(message)) > 1 for message in usual):
        yield _one_call_each(usual), None
    yield [_with_arguments_as_text(message) for message in usual], None
    spelled = [_spelled(message, template) for message in messages]
    yield spelled, SPELLED
    yield [{**message, "role": "user"} if message["role"] == "tool" else message for message in spelled], BY_USER


def silenced(messages: Messages) -> Iterator[list[dict[str, Any]]]:
    """Yield the messages without calls, and with other results: what a template that hears of them writes otherwise."""
    if any(map(_calls, messages)):
        yield [{key: value for key, value in message.items() if key != "tool_calls"} for message in messages]
    if any(message["role"] == "tool" for message in messages):
        yield [
            {**message, "content": f"{message['content']}."} if message["role"] == "tool" else dict(message)
            for message in messages
        ]


def as_python(messages: Messages, text: str) -> bool:
    """Say whether a rendered text has arguments as Python spells them: its template wants the text of their JSON."""
    functions = [call["function"] for message in messages for call in _calls(message)]
    return any(
        isinstance(one["arguments"], Mapping) and str(one["arguments"]) in text for one in functions if one["arguments"]
    )


def with_tools_told(messages: Messages, tools: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the messages with the tools as JSON in the system message, where Phi-4-mini's template reads them."""
    told = {"tools": json.dumps([tool.get("function", tool) for tool in tools], ensure_ascii=False)}
    first, *rest = map(dict, messages)
    if first["role"] == "system":
        return [{**first, **told}, *rest]
    return [{"role": "system", "content": "You are a helpful assistant with some tools.", **told}, first, *rest]


def _calls(message: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    return message.get("tool_calls") or ()


def _with_ids(messages: Messages) -> list[dict[str, Any]]:
    """Return the messages with ids for calls and results that have none, of nine characters, as Mistral wants them."""
    found, n_calls = [], 0
    waiting: list[tuple[str, str]] = []
    for message in map(dict, messages):
        if calls := _calls(message):
            message["tool_calls"] = [{"id": f"call{n_calls + n:05}", **call} for n, call in enumerate(calls, 1)]
            n_calls += len(calls)
            waiting = [(call["id"], call["function"]["name"]) for call in message["tool_calls"]]
        elif message["role"] == "tool" and "tool_call_id" not in message and waiting:
            one = next((one for one in waiting if one[1] == message.get("name")), waiting[0])
            waiting.remove(one)
            message["tool_call_id"] = one[0]
        found.append(message)
    return found


def _one_call_each(messages: Messages) -> list[dict[str, Any]]:
    """Return the messages with every call in a message of its own, what it returned after it."""
    found: list[dict[str, Any]] = []
    at = 0
    while at < len(messages):
        message, calls = messages[at], _calls(messages[at])
        at += 1
        if len(calls) <= 1:
            found.append(dict(message))
            continue
        results = list(takewhile(lambda one: one["role"] == "tool", messages[at:]))
        at += len(results)
        for number, call in enumerate(calls):
            found.append({**message, "content": "" if number else message["content"], "tool_calls": [call]})
            found += [dict(one) for one in results if one.get("tool_call_id") == call["id"]]
    return found


def _with_arguments_as_text(message: Mapping[str, Any]) -> dict[str, Any]:
    if not _calls(message):
        return dict(message)
    calls = []
    for call in _calls(message):
        text = json.dumps(call["function"]["arguments"], ensure_ascii=False)
        calls.append({**call, "function": {**call["function"], "arguments": text}})
    return {**message, "tool_calls": calls}


def _spelled(message: Mapping[str, Any], template: str) -> dict[str, Any]:
    """Return the message with its calls as text, in the marks that the template names."""
    if not _calls(message):
        return dict(message)
    values = [{key: call["function"][key] for key in ("name", "arguments")} for call in _calls(message)]
    texts = [json.dumps(value, ensure_ascii=False) for value in values]
    if "<|tool_call|>" in template or "<|tool|>" in template:
        text = f"<|tool_call|>[{', '.join(texts)}]"
    elif "<tool_call>" in template:
        text = "\n".join(f"<tool_call>\n{text}\n</tool_call>" for text in texts)
    else:
        text = "\n".join(texts)
    rest = {key: value for key, value in message.items() if key != "tool_calls"}
    return {**rest, "content": "\n".join(filter(None, (message["content"], text)))}
