"""The chat model for LangChain: streams, tools, forms, statistics, sync and async."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any, Literal

import pytest

from edgelm.errors import ConfigError

ENGINE = {"memory": "2GB", "backend": "numpy", "threads": 1, "context": 512}


@pytest.fixture
def chat(models: list[Path]) -> Any:
    pytest.importorskip("langchain_core")
    from edgelm_apps.langchain import ChatEdgeLM

    return ChatEdgeLM(model=str(models[0]), max_tokens=8, **ENGINE)


def now(zone: Literal["UTC", "CET"]) -> str:
    """Tell the time."""
    return f"noon in {zone}"


def test_a_stream_is_the_answer_and_counts_its_tokens(chat: Any) -> None:
    whole = chat.invoke("the cat")
    pieces = list(chat.stream("the cat"))
    assert "".join(piece.content for piece in pieces) == whole.content != ""
    assert whole.usage_metadata["output_tokens"] == 8
    assert sum(bool(piece.usage_metadata) for piece in pieces) == 1
    assert whole.response_metadata["finish_reason"] == "length"
    assert whole.response_metadata["budget_bytes"] == 2_000_000_000
    assert whole.response_metadata["model_provider"] == "edgelm"


def test_a_conversation_is_not_computed_twice(chat: Any) -> None:
    from langchain_core.messages import HumanMessage, SystemMessage

    said = [SystemMessage("be brief"), HumanMessage("the cat")]
    first = chat.invoke(said, regex="[a-z]{12}")  # half characters of random weights could not be spelled again
    second = chat.invoke([*said, first, HumanMessage([{"type": "text", "text": "and the dog"}])])
    cached = second.usage_metadata["input_token_details"]["cache_read"]
    assert cached >= first.usage_metadata["total_tokens"] - 1


def test_async_answers_equal_sync_ones(chat: Any) -> None:
    async def main() -> list[str]:
        async def streamed() -> str:
            return "".join([piece.content async for piece in chat.astream("the cat")])

        return await asyncio.gather(streamed(), streamed(), *(answer(n) for n in range(2)))

    async def answer(_: int) -> str:
        return (await chat.ainvoke("the cat")).content

    assert asyncio.run(main()) == [chat.invoke("the cat").content] * 4


def test_options_of_a_call_come_before_those_of_the_model(chat: Any) -> None:
    assert chat.invoke("the cat", max_tokens=3).usage_metadata["output_tokens"] == 3
    assert chat.bind(regex="(yes|no)!").invoke("the cat").content in ("yes!", "no!")
    word = chat.invoke("the cat").content[2:5]
    assert word not in chat.invoke("the cat", stop=[word]).content
    with pytest.raises(ConfigError, match="unknown option 'nonsense'"):
        chat.invoke("the cat", nonsense=1)
    with pytest.raises(ValueError, match="Extra inputs are not permitted"):
        type(chat)(model="x", nonsense=1)


def test_log_probabilities(chat: Any) -> None:
    found = chat.invoke("the cat", logprobs=3).response_metadata["logprobs"]["content"]
    assert len(found) == 8
    assert all(len(one["top_logprobs"]) == 3 and one["logprob"] <= 0 for one in found)


def test_forced_tools_are_called_and_their_results_read(chat: Any) -> None:
    from langchain_core.messages import HumanMessage, ToolMessage

    with_tools = chat.bind_tools([now], tool_choice="any")
    said: list[Any] = [HumanMessage("the cat")]
    answer = with_tools.invoke(said, max_tokens=80)
    (call,) = answer.tool_calls
    assert call["name"] == "now"
    assert list(call["args"]) == ["zone"]
    assert answer.response_metadata["finish_reason"] == "tool_calls"
    assert answer.content == ""
    said += [answer, ToolMessage("noon", tool_call_id=call["id"])]
    assert chat.bind_tools([now]).invoke(said).usage_metadata["input_token_details"]["cache_read"] > 20
    with pytest.raises(ConfigError, match="not among the tools: now"):
        chat.bind_tools([now], tool_choice="later")
    assert chat.bind_tools([now], tool_choice="none").invoke("the cat").content == chat.invoke("the cat").content


def test_structured_answers(chat: Any) -> None:
    from pydantic import BaseModel

    class Animal(BaseModel):
        """An animal."""

        name: Literal["cat", "dog"]
        legs: Literal[2, 4]

    wide = chat.model_copy(update={"max_tokens": 120})
    assert isinstance(wide.with_structured_output(Animal).invoke("the cat"), Animal)
    raw = chat.bind(json_schema=Animal.model_json_schema()).invoke("the cat", max_tokens=120)
    assert sorted(json.loads(raw.content))[:2] == ["legs", "name"]


def test_what_is_no_text_is_refused_by_name(chat: Any) -> None:
    from langchain_core.messages import HumanMessage, RemoveMessage

    with pytest.raises(ConfigError, match="'image_url'; edgelm's models read texts only"):
        chat.invoke([HumanMessage([{"type": "image_url", "image_url": {"url": "data:"}}])])
    with pytest.raises(ConfigError, match="'remove' is none of a chat"):
        chat.invoke([RemoveMessage(id="x")])


def test_equal_models_share_what_is_loaded(chat: Any) -> None:
    from edgelm_apps import holding

    chat.invoke("the cat")
    held = holding._held
    type(chat)(model=chat.model, temperature=1, seed=2, max_tokens=3, **ENGINE).invoke("the cat")
    assert holding._held is held
