"""`POST /v1/responses`: the newer words for a chat answer. Stateless: nothing that was said is kept."""

from __future__ import annotations

from typing import Any

from edgelm_apps.server.answers import ChatAsked, text_of
from edgelm_apps.server.replies import Collected, Json, finish_of, new_id, now
from edgelm_apps.server.wire import AsJson, ResponseRequest, TextFormatSchema


def asked_of(request: ResponseRequest, defaults: dict[str, Any]) -> ChatAsked:
    """Return what a request of this API asks for."""
    messages = [{"role": "system", "content": request.instructions}] if request.instructions else []
    if isinstance(request.input, str):
        messages.append({"role": "user", "content": request.input})
    else:
        messages += [{"role": one.role, "content": text_of(one.content)} for one in request.input]
    given = {"max_tokens": request.max_output_tokens, "temperature": request.temperature, "top_p": request.top_p}
    options = defaults | {name: value for name, value in given.items() if value is not None}
    match request.text.format if request.text is not None else None:
        case AsJson():
            options["json_schema"] = {"type": "object"}
        case TextFormatSchema(schema=schema):
            options["json_schema"] = schema
    return ChatAsked(messages, [], options, 1, True)


class Response:
    """A response object while it is written, and the events that tell of it."""

    def __init__(self, name: str, request: ResponseRequest) -> None:
        self._number = 0
        self._message = new_id("msg")
        self._told: Json = {
            "id": new_id("resp"),
            "object": "response",
            "created_at": now(),
            "model": name,
            "status": "in_progress",
            "error": None,
            "incomplete_details": None,
            "instructions": request.instructions,
            "max_output_tokens": request.max_output_tokens,
            "metadata": request.metadata or {},
            "output": [],
            "parallel_tool_calls": False,
            "temperature": request.temperature,
            "text": {"format": {"type": "text"}},
            "tool_choice": "none",
            "tools": [],
            "top_p": request.top_p,
            "usage": None,
        }

    def begun(self) -> list[Json]:
        """Return the events before the first piece of text."""
        where = {"item_id": self._message, "output_index": 0, "content_index": 0}
        return [
            self._event("response.created", response=self._told),
            self._event("response.in_progress", response=self._told),
            self._event("response.output_item.added", output_index=0, item=self._item("in_progress", [])),
            self._event("response.content_part.added", **where, part=_part("")),
        ]

    def piece(self, text: str) -> Json:
        """Return the event of a piece of text."""
        return self._event(
            "response.output_text.delta", item_id=self._message, output_index=0, content_index=0, delta=text,
            logprobs=[],
        )  # fmt: skip

    def ended(self, collected: Collected) -> list[Json]:
        """Return the events after the last piece."""
        text, whole = collected.text(0), self.whole(collected)
        where = {"item_id": self._message, "output_index": 0, "content_index": 0}
        return [
            self._event("response.output_text.done", **where, text=text, logprobs=[]),
            self._event("response.content_part.done", **where, part=_part(text)),
            self._event("response.output_item.done", output_index=0, item=whole["output"][0]),
            self._event(f"response.{whole['status']}", response=whole),
        ]

    def whole(self, collected: Collected) -> Json:
        """Return the object of the whole answer."""
        chunk, text = collected.last[0], collected.text(0)
        usage, complete = chunk.usage, finish_of(chunk) == "stop"
        status = "completed" if complete else "incomplete"
        return self._told | {
            "status": status,
            "incomplete_details": None if complete else {"reason": "max_output_tokens"},
            "output": [self._item(status, [_part(text)])],
            "usage": {
                "input_tokens": usage.prompt_tokens,
                "input_tokens_details": {"cached_tokens": usage.cached_tokens},
                "output_tokens": usage.completion_tokens,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": usage.prompt_tokens + usage.completion_tokens,
            },
        }

    def _item(self, status: str, content: list[Json]) -> Json:
        return {"type": "message", "id": self._message, "status": status, "role": "assistant", "content": content}

    def _event(self, kind: str, **fields: Any) -> Json:
        self._number += 1
        return {"type": kind, "sequence_number": self._number - 1, **fields}


def _part(text: str) -> Json:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
