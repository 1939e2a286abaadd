"""Programs that speak OpenAI's API through connectors of their own: `llm`, and LangChain's ChatOpenAI."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
from serving import Running


def now(zone: Literal["UTC", "CET"]) -> str:
    """Tell the time."""
    return f"noon in {zone}"


@pytest.fixture
def llm(server: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The package, with the served models in its file of models that speak OpenAI's API."""
    llm = pytest.importorskip("llm")
    common = f"  api_base: {server.url}/v1\n  supports_schema: true\n  supports_tools: true\n"
    models = [f"- model_id: served\n  model_name: first\n{common}"]
    models += [f"- model_id: answering\n  model_name: first\n  responses: true\n{common}"]
    monkeypatch.setenv("LLM_USER_PATH", str(tmp_path))
    (tmp_path / "extra-openai-models.yaml").write_text("".join(models))
    return llm


@pytest.fixture(scope="module")
def chat_openai(server: Running) -> Iterator[Callable[..., Any]]:
    kind = pytest.importorskip("langchain_openai").ChatOpenAI
    made = []

    def make(**more: Any) -> Any:
        made.append(kind(base_url=f"{server.url}/v1", api_key="none", model="first", max_retries=0, **more))
        return made[-1]

    yield make
    made[-1].root_client.close()  # all of them share it


def test_llm_streams_and_counts(llm: Any) -> None:
    model = llm.get_model("served")
    response = model.prompt("the cat", max_tokens=8)
    pieces = list(response)
    assert len(pieces) > 1
    assert response.usage().output == 8
    assert model.prompt("the cat", max_tokens=8, stream=False).text() == "".join(pieces)

    async def main() -> str:
        async_model, made = llm.get_async_model("served"), []
        get_client = async_model.get_client
        async_model.get_client = lambda *key, **more: made.append(get_client(*key, **more)) or made[-1]
        text = await async_model.prompt("the cat", max_tokens=8).text()
        await made[0].close()  # llm leaves that to the end of the process
        return text

    assert asyncio.run(main()) == "".join(pieces)


def test_llm_conversations_and_schemas(llm: Any) -> None:
    conversation = llm.get_model("served").conversation()
    conversation.prompt("the cat", system="be brief", max_tokens=8).text()
    second = conversation.prompt("and the dog", max_tokens=8)
    second.text()
    assert second.usage().details["prompt_tokens_details"]["cached_tokens"] > 10
    answer = llm.get_model("served").prompt("the cat", schema=llm.schema_dsl("legs int"), max_tokens=40).text()
    assert isinstance(json.loads(answer)["legs"], int)


@pytest.mark.parametrize("stream", [True, False])
def test_llm_offers_tools_and_returns_their_results(llm: Any, stream: bool) -> None:
    from llm.parts import Message, TextPart, ToolCallPart, ToolResultPart

    messages = [
        Message("user", [TextPart("the cat")]),
        Message("assistant", [ToolCallPart("now", {"zone": "UTC"}, tool_call_id="call_1")]),
        Message("tool", [ToolResultPart("now", "noon", tool_call_id="call_1")]),
    ]
    response = llm.get_model("served").prompt(messages=messages, tools=[now], max_tokens=8, stream=stream)
    assert response.text()


def test_llm_uses_the_responses_of_the_server(llm: Any) -> None:
    schema = {"type": "object", "properties": {"legs": {"enum": [2, 4]}}, "required": ["legs"]}
    schema["additionalProperties"] = False
    for stream in (True, False):
        response = llm.get_model("answering").prompt("the cat", schema=schema, stream=stream)
        assert json.loads(response.text())["legs"] in (2, 4)
        assert response.usage().output > 4


def test_langchain_streams_and_counts(chat_openai: Callable[..., Any]) -> None:
    chat = chat_openai(max_tokens=8)
    whole = chat.invoke("the cat")
    assert whole.usage_metadata["output_tokens"] == 8
    pieces = list(chat.stream("the cat", stream_usage=True))
    assert "".join(piece.content for piece in pieces) == whole.content
    assert sum(piece.usage_metadata["output_tokens"] for piece in pieces if piece.usage_metadata) == 8

    async def main() -> list[str]:
        streamed = "".join([piece.content async for piece in chat.astream("the cat")])
        whole = (await chat.ainvoke("the cat")).content
        await chat.root_async_client.close()
        return [streamed, whole]

    assert asyncio.run(main()) == [whole.content] * 2


def test_langchain_reads_log_probabilities(chat_openai: Callable[..., Any]) -> None:
    chat = chat_openai(max_tokens=8, logprobs=True, top_logprobs=3)
    found = chat.invoke("the cat").response_metadata["logprobs"]["content"]
    assert [len(one["top_logprobs"]) for one in found] == [3] * 8


def test_langchain_forces_tools(chat_openai: Callable[..., Any]) -> None:
    from langchain_core.messages import HumanMessage, ToolMessage

    for choice in ("any", "now"):
        with_tools = chat_openai(max_tokens=120).bind_tools([now], tool_choice=choice, strict=True)
        answer = with_tools.invoke("the cat")
        (call,) = answer.tool_calls
        assert call["name"] == "now"
    pieces = list(with_tools.stream("the cat"))
    (streamed,) = sum(pieces[1:], pieces[0]).tool_calls
    assert streamed["args"] == call["args"]
    said = [HumanMessage("the cat"), answer, ToolMessage("noon", tool_call_id=call["id"])]
    assert chat_openai(max_tokens=8).bind_tools([now]).invoke(said).content


@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")  # the connector's, where it streams
@pytest.mark.parametrize("method", ["json_schema", "function_calling", "json_mode"])
def test_langchain_structures_answers(chat_openai: Callable[..., Any], method: str) -> None:
    from pydantic import BaseModel, ConfigDict

    class Animal(BaseModel):
        """An animal."""

        model_config = ConfigDict(extra="forbid")

        name: Literal["cat", "dog"]
        legs: Literal[2, 4]

    chat = chat_openai(max_tokens=80)
    asked = chat.with_structured_output(Animal, method=method, include_raw=True).invoke("the cat")
    if method == "json_mode":  # any object will do
        assert isinstance(json.loads(asked["raw"].content), dict)
    else:
        assert isinstance(asked["parsed"], Animal)
    if method == "json_schema":
        streamed = list(chat.with_structured_output(Animal, method=method).stream("the cat"))
        assert isinstance(streamed[-1], Animal)


def test_langchain_uses_the_responses_of_the_server(chat_openai: Callable[..., Any]) -> None:
    chat = chat_openai(max_tokens=8, use_responses_api=True)
    whole = chat.invoke("the cat")
    assert whole.text
    assert "".join(piece.text for piece in chat.stream("the cat")) == whole.text


def test_langchain_embeds(server: Running, tmp_path: Path) -> None:
    from serving import running

    from edgelm.testing.tiny_encoder import tiny_encoder

    embeddings = pytest.importorskip("langchain_openai").OpenAIEmbeddings
    path = tiny_encoder(tmp_path / "vectors.gguf", "bert")
    with running({"vectors": path}, engine={"context": 128}) as found:
        # texts are sent as they are: another model's tokens would mean nothing here
        model = embeddings(
            base_url=f"{found.url}/v1", api_key="none", model="vectors", check_embedding_ctx_length=False
        )
        vectors = model.embed_documents(["the cat", "the dog"])
        assert len(vectors) == 2
        assert model.embed_query("the cat") == pytest.approx(vectors[0], abs=1e-5)
