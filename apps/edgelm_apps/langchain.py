"""A chat model for LangChain that computes in this process, inside a memory budget.

    from edgelm_apps.langchain import ChatEdgeLM

    model = ChatEdgeLM(model="smollm2-135m-instruct", memory="400MB")
    print(model.invoke("What is a compiler?").content)

Messages and answers go through here in both directions; the model itself is held by `edgelm_apps.holding`.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import aclosing, closing
from typing import TYPE_CHECKING, Any

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.language_models import BaseChatModel
from langchain_core.language_models.base import LangSmithParams
from langchain_core.language_models.chat_models import agenerate_from_stream, generate_from_stream
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage, ToolMessage
from langchain_core.messages.ai import InputTokenDetails, UsageMetadata
from langchain_core.messages.tool import tool_call_chunk
from langchain_core.outputs import ChatGenerationChunk, ChatResult
from langchain_core.runnables import Runnable
from langchain_core.tools import BaseTool
from langchain_core.utils.function_calling import convert_to_openai_tool
from pydantic import ConfigDict

from edgelm.errors import ConfigError
from edgelm_apps.holding import ENGINE, Question, aanswer, answer

if TYPE_CHECKING:
    from edgelm import Chunk, Usage

SAMPLING = (
    "max_tokens", "temperature", "top_k", "top_p", "min_p", "repeat_penalty", "presence_penalty", "frequency_penalty",
    "seed", "stop", "logprobs",
)  # fmt: skip
ROLES = {"human": "user", "ai": "assistant", "AIMessageChunk": "assistant", "system": "system", "tool": "tool"}
_UNSEEN_BLOCKS = ("tool_use", "tool_call", "reasoning", "thinking")
"""Kinds of content that are no text and need none: calls are fields of their message."""


class ChatEdgeLM(BaseChatModel):
    """A model of this machine as a chat model of LangChain.

    `model` is a path or a name; a name that is not on this machine is pulled. All instances with equal `model` and
    engine options share one loaded model, and one model is loaded at a time. The answer is the likeliest one unless a
    `temperature` is given. `timeout` counts seconds from the beginning of the computation. Further options of
    `edgelm.Model.stream`, such as `json_schema` and `regex`, can be bound: `model.bind(regex="[0-9]+")`.
    """

    model_config = ConfigDict(extra="forbid")

    model: str
    memory: str | int | None = None
    backend: str | None = None
    threads: int | None = None
    context: int | None = None
    kv: str | None = None
    draft: str | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repeat_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: int | None = None
    stop: list[str] | None = None
    timeout: float | None = None
    streaming: bool = False
    logprobs: int | None = None
    """The log-probability of each token and of so many alternatives, in `response_metadata["logprobs"]`."""

    @property
    def _llm_type(self) -> str:
        return "edgelm"

    @property
    def _identifying_params(self) -> dict[str, Any]:
        return {"model": self.model, **self._given(ENGINE), **self._given(SAMPLING)}

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> LangSmithParams:
        told = super()._get_ls_params(stop=stop, **kwargs)
        told["ls_model_name"] = kwargs.get("model", self.model)
        return told

    def bind_tools(
        self,
        tools: Sequence[dict[str, Any] | type | Callable[..., Any] | BaseTool],
        *,
        tool_choice: str | bool | dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Runnable[Any, AIMessage]:
        """Return this model with tools. `tool_choice`: "auto", "none", "any" or "required", or the name of a tool."""
        described = [convert_to_openai_tool(tool)["function"] for tool in tools]
        return self.bind(tools=_chosen(described, tool_choice), forced=_forces(tool_choice), **kwargs)

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        name, engine, question = self._asked(messages, stop, kwargs)
        with closing(answer(name, engine, question)) as chunks:
            for chunk in chunks:
                piece = _piece(chunk, name)
                if run_manager is not None:
                    run_manager.on_llm_new_token(chunk.text, chunk=piece)
                yield piece

    async def _astream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[ChatGenerationChunk]:
        name, engine, question = self._asked(messages, stop, kwargs)
        async with aclosing(aanswer(name, engine, question)) as chunks:
            async for chunk in chunks:
                piece = _piece(chunk, name)
                if run_manager is not None:
                    await run_manager.on_llm_new_token(chunk.text, chunk=piece)
                yield piece

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        return generate_from_stream(self._stream(messages, stop, run_manager, **kwargs))

    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        return await agenerate_from_stream(self._astream(messages, stop, run_manager, **kwargs))

    def _asked(
        self, messages: list[BaseMessage], stop: list[str] | None, kwargs: dict[str, Any]
    ) -> tuple[str, dict[str, Any], Question]:
        options = {**self._given(SAMPLING), **{name: value for name, value in kwargs.items() if value is not None}}
        if stop is not None:
            options["stop"] = stop
        if self.timeout is not None:
            options.setdefault("timeout_s", self.timeout)
        name, tools, forced = options.pop("model", self.model), options.pop("tools", []), options.pop("forced", False)
        return name, self._given(ENGINE), Question(_told(messages), options, tools, forced)

    def _given(self, names: Sequence[str]) -> dict[str, Any]:
        return {name: value for name in names if (value := getattr(self, name)) is not None}


def _forces(choice: str | bool | dict[str, Any] | None) -> bool:
    return choice not in (None, False, "auto", "none")


def _chosen(tools: list[dict[str, Any]], choice: str | bool | dict[str, Any] | None) -> list[dict[str, Any]]:
    """Return the tools that a choice leaves. Raises `ConfigError` for one that leaves none of them."""
    if choice == "none":
        return []
    if choice in (None, False, True, "auto", "any", "required"):
        return tools
    wanted = choice.get("function", choice).get("name") if isinstance(choice, dict) else choice
    found = [tool for tool in tools if tool["name"] == wanted]
    if not found:
        names = ", ".join(tool["name"] for tool in tools)
        raise ConfigError(f"tool_choice names {wanted!r}, which is not among the tools: {names}")
    return found


def _told(messages: Sequence[BaseMessage]) -> list[dict[str, Any]]:
    """Return messages in edgelm's words. Raises `ConfigError` for a kind that it has no word for."""
    names: dict[str | None, str] = {}
    told: list[dict[str, Any]] = []
    for message in messages:
        role = getattr(message, "role", None) or ROLES.get(message.type)
        if role is None:
            raise ConfigError(f"a message of the type {message.type!r} is none of a chat (known: {', '.join(ROLES)})")
        one: dict[str, Any] = {"role": role, "content": _content(message)}
        if isinstance(message, AIMessage) and message.tool_calls:
            names |= {call["id"]: call["name"] for call in message.tool_calls}
            functions = [{"name": call["name"], "arguments": call["args"]} for call in message.tool_calls]
            one["tool_calls"] = [{"type": "function", "function": function} for function in functions]
        if isinstance(message, ToolMessage):
            one["name"] = message.name or names.get(message.tool_call_id, "")
        told.append(one)
    return told


def _content(message: BaseMessage) -> str:
    """Return the text of a message. Raises `ConfigError` where it is more than text."""
    if isinstance(message.content, str):
        return message.content
    texts = []
    for block in message.content:
        kind = "text" if isinstance(block, str) else block.get("type")
        if kind == "text":
            texts.append(block if isinstance(block, str) else block["text"])
        elif kind not in _UNSEEN_BLOCKS:
            raise ConfigError(f"a message has content of the type {kind!r}; edgelm's models read texts only")
    return "".join(texts)


def _piece(chunk: Chunk, name: str) -> ChatGenerationChunk:
    """Return a piece of an answer in LangChain's words; the last one has calls, tokens and statistics."""
    noted = _noted(chunk)
    if chunk.finish_reason is None:
        return ChatGenerationChunk(message=AIMessageChunk(content=chunk.text), generation_info=noted)
    from edgelm_apps.engine import statistics

    calls = [
        tool_call_chunk(
            name=call.name, args=json.dumps(call.arguments), id=f"call_{secrets.token_hex(8)}", index=number
        )
        for number, call in enumerate(chunk.tool_calls)
    ]
    usage = chunk.usage
    about = {
        "finish_reason": "tool_calls" if calls else chunk.finish_reason,
        "model_name": name,
        "model_provider": "edgelm",
        "backend": usage.backend,
        "budget_bytes": usage.budget_bytes,
        "stats": statistics(usage),
    }
    message = AIMessageChunk(
        content=chunk.text,
        tool_call_chunks=calls,
        usage_metadata=_usage(usage),
        response_metadata=about,
        chunk_position="last",
    )
    return ChatGenerationChunk(message=message, generation_info=noted)


def _usage(usage: Usage) -> UsageMetadata:
    return UsageMetadata(
        input_tokens=usage.prompt_tokens,
        output_tokens=usage.completion_tokens,
        total_tokens=usage.prompt_tokens + usage.completion_tokens,
        input_token_details=InputTokenDetails(cache_read=usage.cached_tokens),
    )


def _noted(chunk: Chunk) -> dict[str, Any] | None:
    """Return the log-probabilities of a piece: lists of them are put together by LangChain."""
    if chunk.logprobs is None:
        return None
    top = [{"token_id": token, "logprob": logprob} for token, logprob in chunk.logprobs.top]
    one = {"token_id": chunk.token_id, "logprob": chunk.logprobs.logprob, "top_logprobs": top}
    return {"logprobs": {"content": [one]}}
