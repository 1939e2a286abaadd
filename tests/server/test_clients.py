"""The official client, sync and async: what it sends is understood, and what it gets it understands."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest
from serving import Running

if TYPE_CHECKING:  # imported where it is used: it takes memory that other tests would count
    import openai

CAT = [{"role": "user", "content": "the cat and the dog"}]
NOW = {
    "type": "function",
    "function": {
        "name": "now",
        "description": "Tell the time.",
        "parameters": {
            "type": "object",
            "properties": {"zone": {"enum": ["UTC", "CET"]}},
            "required": ["zone"],
            "additionalProperties": False,
        },
    },
}


@pytest.fixture(scope="module")
def sdk() -> Any:
    return pytest.importorskip("openai")


@pytest.fixture
def client(sdk: Any, server: Running) -> Iterator[openai.OpenAI]:
    with sdk.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_models(sdk: Any, client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["first", "second"]
    assert client.models.retrieve("second").id == "second"
    with pytest.raises(sdk.NotFoundError, match="first, second"):
        client.models.retrieve("third")


def test_an_answer_and_its_stream_are_the_same(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model="first", messages=CAT, max_tokens=12)
    events = list(
        client.chat.completions.create(
            model="first", messages=CAT, max_completion_tokens=12, stream=True, stream_options={"include_usage": True}
        )
    )
    assert events[0].choices[0].delta.role == "assistant"
    assert "".join(event.choices[0].delta.content or "" for event in events[:-1]) == whole.choices[0].message.content
    assert events[-2].choices[0].finish_reason == whole.choices[0].finish_reason == "length"
    assert events[-1].choices == []
    assert events[-1].usage.completion_tokens == whole.usage.completion_tokens == 12
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + 12
    assert events[-1].usage.prompt_tokens_details.cached_tokens == whole.usage.prompt_tokens - 1


def test_another_model_is_swapped_in(client: openai.OpenAI, server: Running) -> None:
    answers = {}
    for name in ("first", "second", "first"):
        answer = client.chat.completions.create(model=name, messages=CAT, max_tokens=8)
        assert answer.model == server.pool.name == name
        assert answers.setdefault(name, answer.choices[0].message.content) == answer.choices[0].message.content
    assert answers["first"] != answers["second"]


def test_several_answers_with_seeds(client: openai.OpenAI) -> None:
    def ask(seed: int, n: int) -> list[str | None]:
        answer = client.chat.completions.create(
            model="first", messages=CAT, max_tokens=8, temperature=1, seed=seed, n=n
        )
        return [choice.message.content for choice in answer.choices]

    assert ask(5, 3) == ask(5, 1) + ask(6, 1) + ask(7, 1)


def test_logprobs(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="first", messages=CAT, max_tokens=6, logprobs=True, top_logprobs=3)
    found = answer.choices[0].logprobs.content
    assert len(found) == 6
    for token in found:
        assert len(token.top_logprobs) == 3
        assert token.logprob == token.top_logprobs[0].logprob <= 0
        assert bytes(token.bytes).decode("utf-8", "replace") == token.token


def test_a_forced_call_of_a_tool_and_its_result(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="first", messages=CAT, tools=[NOW], tool_choice="required", max_tokens=80
    )
    (call,) = answer.choices[0].message.tool_calls
    assert answer.choices[0].finish_reason == "tool_calls"
    assert call.function.name == "now"
    assert json.loads(call.function.arguments)["zone"] in ("UTC", "CET")
    events = list(
        client.chat.completions.create(
            model="first", messages=CAT, tools=[NOW], max_tokens=80, stream=True,
            tool_choice={"type": "function", "function": {"name": "now"}},
        )
    )  # fmt: skip
    (streamed,) = [call for event in events for call in event.choices[0].delta.tool_calls or ()]
    assert streamed.function.to_dict() == call.function.to_dict()
    turn = [*CAT, answer.choices[0].message, {"role": "tool", "tool_call_id": call.id, "content": "it is noon"}]
    assert client.chat.completions.create(model="first", messages=turn, tools=[NOW], max_tokens=4).choices


def test_structured_answers(client: openai.OpenAI) -> None:
    from pydantic import BaseModel

    class Animal(BaseModel):
        name: str
        legs: int

    parsed = client.chat.completions.parse(model="first", messages=CAT, response_format=Animal, max_tokens=120)
    assert isinstance(parsed.choices[0].message.parsed, Animal)
    answer = client.chat.completions.create(
        model="first", messages=CAT, response_format={"type": "json_object"}, max_tokens=120
    )
    assert isinstance(json.loads(answer.choices[0].message.content), dict)


def test_completions(client: openai.OpenAI) -> None:
    text = client.completions.create(model="first", prompt="the cat", max_tokens=6, echo=True, logprobs=1)
    assert text.choices[0].text.startswith("the cat")
    assert len(text.choices[0].logprobs.tokens) == 6
    events = list(client.completions.create(model="first", prompt="the cat", max_tokens=6, stream=True))
    assert "the cat" + "".join(event.choices[0].text for event in events) == text.choices[0].text


def test_responses(client: openai.OpenAI) -> None:
    whole = client.responses.create(model="first", input="the cat and the dog", max_output_tokens=9)
    assert whole.status == "incomplete"
    assert whole.usage.output_tokens == 9
    with client.responses.stream(model="first", input="the cat and the dog", max_output_tokens=9) as stream:
        kinds = [event.type for event in stream]
    assert kinds[0] == "response.created"
    assert "response.output_text.delta" in kinds
    assert (
        whole.output_text
        == client.chat.completions.create(model="first", messages=CAT, max_tokens=9).choices[0].message.content
    )


def test_async(sdk: Any, server: Running) -> None:
    async def main() -> list[str]:
        async with sdk.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:

            async def ask(text: str) -> str:
                stream = await client.chat.completions.create(
                    model="first", messages=[{"role": "user", "content": text}], max_tokens=10, stream=True
                )
                return "".join([event.choices[0].delta.content or "" async for event in stream])

            return await asyncio.gather(*(ask("the cat") for _ in range(6)))

    assert len(set(asyncio.run(main()))) == 1


def test_mistakes_are_typed(sdk: Any, client: openai.OpenAI) -> None:
    with pytest.raises(sdk.BadRequestError, match="918 tokens and the context holds 512") as caught:
        client.chat.completions.create(
            model="first", messages=[{"role": "user", "content": "the cat " * 300}], stream=True
        )
    assert caught.value.code == "context_length_exceeded"
    assert caught.value.body["n_ctx"] == 512
    with pytest.raises(sdk.BadRequestError, match="audio is not supported") as caught:
        client.chat.completions.create(model="first", messages=CAT, audio={"voice": "ash", "format": "wav"})
    assert caught.value.param == "audio"
    with pytest.raises(sdk.BadRequestError, match="writes texts"):
        client.embeddings.create(model="first", input="x")
