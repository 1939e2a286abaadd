"""What a request means for a model: messages, options and tools in edgelm's words, and the stream they lead to."""

from __future__ import annotations

import warnings
from collections.abc import Generator, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

import edgelm
from edgelm_apps.server.errors import Refused, Unsupported
from edgelm_apps.server.wire import (
    AsJson,
    AsSchema,
    Assistant,
    ChatRequest,
    CompletionRequest,
    Content,
    Message,
    NamedTool,
    ResponseFormat,
    Sampled,
    Tool,
)

if TYPE_CHECKING:
    from edgelm import Chunk, Model

OBJECT = {"type": "object"}


class Piece(NamedTuple):
    """A chunk of answer number `number`."""

    number: int
    chunk: Chunk


def sampling(request: Sampled, defaults: dict[str, Any]) -> dict[str, Any]:
    """Return the options of the stream that a request asks for, where it is silent those that the server has."""
    options = dict(defaults)
    for name in (
        "temperature", "top_p", "top_k", "min_p", "repeat_penalty", "presence_penalty", "frequency_penalty", "seed",
        "max_tokens", "speculate",
    ):  # fmt: skip
        if (value := getattr(request, name)) is not None:
            options[name] = value
    if request.stop:
        options["stop"] = request.stop
    if request.logit_bias:
        options["logit_bias"] = {int(token): bias for token, bias in request.logit_bias.items()}
    return options


def of_chat(request: ChatRequest, defaults: dict[str, Any]) -> ChatAsked:
    """Return what a chat request asks for. Raises `Refused` for what cannot be done."""
    options = sampling(request, defaults)
    if request.max_completion_tokens is not None:
        options["max_tokens"] = request.max_completion_tokens
    if request.logprobs:
        options["logprobs"] = request.top_logprobs or 0
    options |= form_of(request.response_format)
    for name in ("regex", "grammar"):
        if (value := getattr(request, name)) is not None:
            options[name] = value
    tools = [msgspec.to_builtins(tool)["function"] for tool in request.tools or ()]
    tools = [{key: value for key, value in tool.items() if value is not None} for tool in tools]
    choice = request.tool_choice or "auto"
    if choice == "none":
        tools = []
    elif choice != "auto":
        if isinstance(choice, NamedTool):
            wanted = choice.function.name
            tools = [tool for tool in tools if tool["name"] == wanted]
            if not tools:
                raise Refused(f"tool_choice names the function {wanted!r}, which is not among the tools", "tool_choice")
        if any(name in options for name in ("json_schema", "regex", "grammar")):
            raise Unsupported("a forced tool_choice and a form of the answer exclude each other", "tool_choice")
        options["json_schema"] = edgelm.call_schema(tools)
    several = request.parallel_tool_calls is not False
    return ChatAsked([_message(one) for one in request.messages], tools, options, request.n or 1, several)


class ChatAsked(NamedTuple):
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]]
    options: dict[str, Any]
    n: int
    several_calls: bool

    def prompt(self, model: Model) -> list[int]:
        """Return the ids of the prompt."""
        tools = [{"type": "function", "function": tool} for tool in self.tools] or None
        return model.tokenizer.encode_prompt(model.template.render(self.messages, tools=tools))

    def answers(self, model: Model) -> Generator[Piece, None, None]:
        """Yield the pieces of all answers, one answer after the other: the prompt is computed once."""
        for index, options in _seeds(self.options, self.n):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", edgelm.ToolsIgnored)  # the client cannot choose another template
                chat = model.chat(tools=self.tools)
            for chunk in chat.answer(self.messages, **options):
                yield Piece(index, chunk)


class CompletionAsked(NamedTuple):
    given: str | list[int]
    options: dict[str, Any]
    n: int

    def prompt(self, model: Model) -> list[int]:
        """Return the ids of the prompt."""
        return model.tokenizer.encode(self.given) if isinstance(self.given, str) else self.given

    def answers(self, model: Model) -> Generator[Piece, None, None]:
        """As those of `ChatAsked`, without a template."""
        for index, options in _seeds(self.options, self.n):
            given = self.given
            stream = model.stream(given, **options) if isinstance(given, str) else model.stream_ids(given, **options)
            for chunk in stream:
                yield Piece(index, chunk)


def of_completion(request: CompletionRequest, defaults: dict[str, Any]) -> CompletionAsked:
    """Return what a completion request asks for. Raises `Refused` for what cannot be done."""
    options = sampling(request, defaults)
    if request.logprobs is not None:
        options["logprobs"] = request.logprobs
    if request.echo and not isinstance(request.prompt, str):
        raise Unsupported("echo is for prompts that are text", "echo")
    return CompletionAsked(request.prompt, options, request.n or 1)


def form_of(given: ResponseFormat | None) -> dict[str, Any]:
    """Return the option that a response format is."""
    match given:
        case AsJson():
            return {"json_schema": OBJECT}
        case AsSchema():
            schema = given.json_schema.schema
            return {"json_schema": True if schema is msgspec.UNSET else schema}
        case _:
            return {}


def text_of(content: Content | None) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    return "".join(part.text for part in content)


def _message(message: Message) -> dict[str, Any]:
    told: dict[str, Any] = {"role": type(message).__name__.lower(), "content": text_of(message.content)}
    match message:
        case Assistant(tool_calls=[_, *_]):
            told["tool_calls"] = msgspec.to_builtins(message.tool_calls)
        case Tool():
            told["tool_call_id"] = message.tool_call_id
    return told


def _seeds(options: dict[str, Any], n: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield a number and the options of each answer: those with a seed draw with another one each."""
    for index in range(n):
        yield index, options if "seed" not in options else options | {"seed": options["seed"] + index}
