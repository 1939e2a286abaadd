"""Answers in the words of the API: objects of whole answers, and of the pieces of a stream."""

from __future__ import annotations

import base64
import json
import secrets
import struct
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from edgelm_apps.server.answers import Piece

if TYPE_CHECKING:
    from edgelm import Chunk, Model, Usage

Json = dict[str, Any]


def new_id(kind: str) -> str:
    return f"{kind}-{secrets.token_hex(12)}"


def now() -> int:
    return int(time.time())


def usage_of(last: Sequence[Usage]) -> Json:
    """Return the `usage` of a request: of the last chunk of each of its answers."""
    prompt = last[0].prompt_tokens if last else 0
    completion = sum(one.completion_tokens for one in last)
    accepted = sum(one.accepted_tokens for one in last)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": last[0].cached_tokens if last else 0},
        "completion_tokens_details": {
            "accepted_prediction_tokens": accepted,
            "rejected_prediction_tokens": sum(one.drafted_tokens for one in last) - accepted,
            "reasoning_tokens": 0,
        },
    }


def stats_of(usage: Usage) -> Json:
    """Return edgelm's own statistics of an answer so far; see `edgelm.Usage`."""
    return asdict(usage) | {"other_s": usage.other_s, "tokens_per_pass": usage.tokens_per_pass}


def finish_of(chunk: Chunk) -> str | None:
    """Return why an answer ended, in the API's words; None while it goes on."""
    if chunk.finish_reason is None:
        return None
    if chunk.tool_calls:
        return "tool_calls"
    return "stop" if chunk.finish_reason == "stop" else "length"


def calls_of(chunk: Chunk, several: bool) -> list[Json]:
    calls = chunk.tool_calls if several else chunk.tool_calls[:1]
    return [
        {
            "id": f"call_{secrets.token_hex(8)}",
            "type": "function",
            "function": {"name": call.name, "arguments": json.dumps(call.arguments, ensure_ascii=False)},
        }
        for call in calls
    ]


def logprobs_of(model: Model, chunk: Chunk) -> Json | None:
    """Return the log-probabilities of the token of a chunk, as chats have them."""
    if chunk.logprobs is None or chunk.token_id is None:
        return None
    top = [_token(model, token, logprob) for token, logprob in chunk.logprobs.top]
    return _token(model, chunk.token_id, chunk.logprobs.logprob) | {"top_logprobs": top}


def _token(model: Model, token: int, logprob: float) -> Json:
    raw = model.tokenizer.token_bytes(token)
    return {"token": raw.decode("utf-8", "replace"), "logprob": logprob, "bytes": list(raw)}


class Collected:
    """The pieces of answers, put together."""

    def __init__(self) -> None:
        self.texts: dict[int, list[str]] = {}
        self.logprobs: dict[int, list[Json]] = {}
        self.last: dict[int, Chunk] = {}

    def add(self, piece: Piece, logprobs: Json | None) -> None:
        self.texts.setdefault(piece.number, []).append(piece.chunk.text)
        if logprobs is not None:
            self.logprobs.setdefault(piece.number, []).append(logprobs)
        self.last[piece.number] = piece.chunk

    def text(self, index: int) -> str:
        return "".join(self.texts[index])

    @property
    def usages(self) -> list[Usage]:
        return [chunk.usage for chunk in self.last.values()]


def chat_completion(name: str, collected: Collected, several_calls: bool) -> Json:
    """Return the object of a whole chat answer."""
    choices = []
    for index, chunk in collected.last.items():
        calls = calls_of(chunk, several_calls)
        text = collected.text(index)
        message: Json = {"role": "assistant", "content": text if text or not calls else None, "refusal": None}
        if calls:
            message["tool_calls"] = calls
        found = collected.logprobs.get(index)
        choices.append(
            {
                "index": index,
                "message": message,
                "logprobs": {"content": found, "refusal": None} if found is not None else None,
                "finish_reason": finish_of(chunk),
            }
        )
    return _head("chatcmpl", "chat.completion", name) | _whole(choices, collected)


def text_completion(name: str, collected: Collected, before: str = "") -> Json:
    """Return the object of a whole answer without a template; `before`: the prompt, if it is to be repeated."""
    choices = [
        {
            "index": index,
            "text": before + collected.text(index),
            "logprobs": _legacy(collected.logprobs[index]) if index in collected.logprobs else None,
            "finish_reason": finish_of(chunk),
        }
        for index, chunk in collected.last.items()
    ]
    return _head("cmpl", "text_completion", name) | _whole(choices, collected)


def _head(kind: str, what: str, model: str) -> Json:
    """Return the fields that every object of this API begins with."""
    return {"id": new_id(kind), "object": what, "created": now(), "model": model, "system_fingerprint": None}


def _whole(choices: list[Json], collected: Collected) -> Json:
    return {"choices": choices, "usage": usage_of(collected.usages), "edgelm": stats_of(collected.usages[-1])}


def _legacy(found: list[Json]) -> Json:
    """Return log-probabilities as completions have them."""
    offsets, at = [], 0
    for one in found:
        offsets.append(at)
        at += len(one["token"])
    return {
        "tokens": [one["token"] for one in found],
        "token_logprobs": [one["logprob"] for one in found],
        "top_logprobs": [{top["token"]: top["logprob"] for top in one["top_logprobs"]} for one in found],
        "text_offset": offsets,
    }


class ChatStream:
    """Objects of the pieces of chat answers: the first of each has the role, the last the reason of its end."""

    def __init__(self, name: str, several_calls: bool) -> None:
        self._head = _head("chatcmpl", "chat.completion.chunk", name)
        self._several = several_calls
        self._begun: set[int] = set()

    def piece(self, piece: Piece, logprobs: Json | None) -> Json:
        chunk = piece.chunk
        delta: Json = {}
        if piece.number not in self._begun:
            self._begun.add(piece.number)
            delta = {"role": "assistant", "content": ""}
        if chunk.text:
            delta["content"] = chunk.text
        if calls := calls_of(chunk, self._several):
            delta["tool_calls"] = [{"index": i, **call} for i, call in enumerate(calls)]
        choice = {
            "index": piece.number,
            "delta": delta,
            "logprobs": {"content": [logprobs], "refusal": None} if logprobs is not None else None,
            "finish_reason": finish_of(chunk),
        }
        return self._head | {"choices": [choice]}

    def end(self, usages: Sequence[Usage]) -> Json:
        """Return the object that has the usage only."""
        return self._head | {"choices": [], "usage": usage_of(usages)}


class TextStream:
    """Objects of the pieces of answers without a template."""

    def __init__(self, name: str) -> None:
        self._head = _head("cmpl", "text_completion", name)

    def piece(self, piece: Piece, logprobs: Json | None) -> Json:
        choice = {
            "index": piece.number,
            "text": piece.chunk.text,
            "logprobs": _legacy([logprobs]) if logprobs is not None else None,
            "finish_reason": finish_of(piece.chunk),
        }
        return self._head | {"choices": [choice]}

    def end(self, usages: Sequence[Usage]) -> Json:
        return self._head | {"choices": [], "usage": usage_of(usages)}


def as_base64(vector: list[float]) -> str:
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
