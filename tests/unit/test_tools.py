"""Calls of tools: found in every family's form, streamed around, and never made of what is none."""

from __future__ import annotations

import json
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

import edgelm
from edgelm.errors import ConfigError
from edgelm.sizes import GB
from edgelm.testing import tiny_model
from edgelm.testing.tiny_vocab import CONTROL, gpt2_vocab
from edgelm.text.tools import MARKS, ToolCall, ToolCallMatcher, call_schema, checked_tools, parse_calls

WEATHER = ToolCall("get_weather", {"city": "Paris", "days": 2})
JSON = '{"name": "get_weather", "arguments": {"city": "Paris", "days": 2}}'
NAMES = frozenset({"get_weather", "add"})
ONE = {
    "Hermes, Qwen, SmolLM3": f"<tool_call>\n{JSON}\n</tool_call>",
    "Llama 3": '<|python_tag|>{"name": "get_weather", "parameters": {"city": "Paris", "days": 2}}',
    "Llama 3, its mark not shown": '{"name": "get_weather", "parameters": {"city": "Paris", "days": 2}}',
    "Llama 3, functions": '<function=get_weather>{"city": "Paris", "days": 2}</function>',
    "Granite 3": f"<|tool_call|>[{JSON}]",
    "Phi-4-mini": f"<|tool_call|>[{JSON}]<|/tool_call|>",
    "Phi-3.5": f"functools[{JSON}]",
    "Mistral": f"[TOOL_CALLS][{JSON}]",
    "FireFunction": f" functools[{JSON}]",
    "Mistral Small 3": '[TOOL_CALLS]get_weather[CALL_ID]a1b2c3d4e[ARGS]{"city": "Paris", "days": 2}',
    "Devstral, Ministral": '[TOOL_CALLS]get_weather[ARGS]{"city": "Paris", "days": 2}',
    "Apriel": f"<tool_calls>[{JSON}]</tool_calls>",
    "Nemotron": f"<TOOLCALL>[{JSON}]</TOOLCALL>",
    "DeepSeek R1": "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n```json\n"
    '{"city": "Paris", "days": 2}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>',
    "FunctionGemma": "<start_function_call>call:get_weather{city:<escape>Paris<escape>,days:2}<end_function_call>",
    "FunctionGemma, going on": "<start_function_call>call:get_weather{city:<escape>Paris<escape>,days:2}"
    "<end_function_call><start_function_response>response:get_weather{value:<escape>rain<escape>}",
    "FunctionGemma, JSON": '<start_function_call>call:get_weather{"city": "Paris", "days": 2}<end_function_call>',
    "Gemma, Python": '```tool_code\nget_weather(city="Paris", days=2)\n```',
    "Gemma, a list": '[get_weather(city="Paris", days=2)]',
    "Gemma, JSON": f"```json\n{JSON}\n```",
    "of the API": f'{{"type": "function", "function": {JSON}}}',
    "arguments as text": json.dumps({"name": "get_weather", "arguments": json.dumps(WEATHER.arguments)}),
}
NONE = {
    "prose": "The weather in Paris is fine.",
    "JSON that is an answer": '{"city": "Paris", "population": 2}',
    "an unknown name": '{"name": "rm", "arguments": {"path": "/"}}',
    "cut off": JSON[:-4],
    "a call and something else": f"<tool_call>{JSON}</tool_call> and so on",
    "no object": '<tool_call>"get_weather"</tool_call>',
    "arguments that are a list": '{"name": "get_weather", "arguments": [1]}',
    "Python that would run": "```tool_code\nget_weather(city=open('x'))\n```",
    "positional": "[get_weather('Paris')]",
    "nothing": "",
}


@pytest.mark.parametrize("form", ONE)
def test_every_form_is_understood(form: str) -> None:
    assert parse_calls(ONE[form], NAMES) == (WEATHER,)


@pytest.mark.parametrize("form", NONE)
def test_what_is_no_call_stays_text(form: str) -> None:
    assert parse_calls(NONE[form], NAMES) == ()
    matcher = ToolCallMatcher(NAMES)
    shown = "".join(map(matcher.feed, NONE[form]))
    rest, calls = matcher.flush()
    assert (shown + rest, calls) == (NONE[form], ())


def test_several_calls() -> None:
    other = ToolCall("add", {"a": 1, "b": 2})
    second = json.dumps({"name": "add", "arguments": other.arguments})
    for text in (
        f"<tool_call>\n{JSON}\n</tool_call>\n<tool_call>\n{second}\n</tool_call>",
        f"[{JSON}, {second}]",
        f"{JSON}; {second}",
        '[get_weather(city="Paris", days=2), add(a=1, b=2)]',
        '<function=get_weather>{"city": "Paris", "days": 2}</function>\n<function=add>{"a": 1, "b": 2}</function>',
        '[TOOL_CALLS]get_weather[CALL_ID]1[ARGS]{"city": "Paris", "days": 2}'
        '[TOOL_CALLS]add[CALL_ID]2[ARGS]{"a": 1, "b": 2}',
        "<start_function_call>call:get_weather{city:<escape>Paris<escape>,days:2}<end_function_call>"
        "<start_function_call>call:add{a:1,b:2}<end_function_call>",
    ):
        assert parse_calls(text, NAMES) == (WEATHER, other)


@pytest.mark.parametrize("size", [1, 3, 1000])
@pytest.mark.parametrize("form", [form for form in ONE if ONE[form][0] in "<`" or ONE[form].startswith("[TOOL")])
def test_text_before_a_call_streams_and_the_call_does_not_show(form: str, size: int) -> None:
    text = f"I look it up < 5 minutes. {ONE[form]}"
    matcher = ToolCallMatcher(NAMES)
    shown = "".join(matcher.feed(text[i : i + size]) for i in range(0, len(text), size))
    rest, calls = matcher.flush()
    assert (shown + rest, calls) == ("I look it up < 5 minutes. ", (WEATHER,))


@pytest.mark.parametrize(
    "text", ["```json\n{}\n```", "a <tool_call> b</tool_call>", "[TOOL_CALLS]x[ARGS]{", 'a, b: "c"']
)
def test_arguments_come_back_as_they_were_written(text: str) -> None:
    call = ToolCall("get_weather", {"city": text, "near": [{"by": text}], "days": None, "now": True})
    spelled = json.dumps(call.arguments)
    for form in (
        f'<tool_call>\n{{"name": "get_weather", "arguments": {spelled}}}\n</tool_call>',
        f"<function=get_weather>{spelled}</function>",
        f"[TOOL_CALLS]get_weather[ARGS]{spelled}",
        f"<start_function_call>call:get_weather{{city:<escape>{text}<escape>,near:[{{by:<escape>{text}<escape>}}],"
        "days:null,now:true}<end_function_call>",
        f"```tool_code\nget_weather(city={text!r}, near=[{{'by': {text!r}}}], days=None, now=True)\n```",
    ):
        assert parse_calls(form, NAMES) == (call,)


@pytest.mark.parametrize("size", [1, 1000])
@pytest.mark.parametrize("before", [
    '<think>```json\n{"x": 1}\n```</think>\n\n', "<think><tool_call> comes next</think>", "[1] is known.\n",
    f"<think>```json\n{JSON}\n``` or not</think>\n",
])  # fmt: skip
def test_an_example_in_a_thought_hides_no_call(before: str, size: int) -> None:
    text = f"{before}<tool_call>\n{JSON}\n</tool_call>"
    matcher = ToolCallMatcher(NAMES)
    shown = "".join(matcher.feed(text[i : i + size]) for i in range(0, len(text), size))
    rest, calls = matcher.flush()
    assert (shown + rest, calls) == (before, (WEATHER,))


def test_long_answers_that_are_no_calls_take_no_time() -> None:
    began = time.perf_counter()
    for text in ("[" * 100_000, "```json\n{}\n``` and " * 500, "<tool_call>" + " " * 100_000 + "x"):
        assert parse_calls(text, NAMES) == ()
        matcher = ToolCallMatcher(NAMES)
        assert (matcher.feed(text) + matcher.flush()[0]) == text
    assert time.perf_counter() - began < 5


def test_tools_are_checked_and_have_a_schema() -> None:
    tools = checked_tools([{"name": "now"}, {"type": "function", "function": {"name": "add", "parameters": {"a": 1}}}])
    assert [tool["function"]["name"] for tool in tools] == ["now", "add"]
    assert call_schema(tools[:1])["properties"]["name"] == {"const": "now"}
    assert len(call_schema(tools)["anyOf"]) == 2
    for wrong in ({}, {"name": ""}, {"name": "x", "parameters": 3}, "x"):
        with pytest.raises(ConfigError):
            checked_tools([wrong])  # type: ignore[list-item]


TEMPLATE = (
    "{% for t in tools or [] %}[{{ t.function.name }}]{% endfor %}{% for m in messages %}{{ m.role }}: {{ m.content }}"
    "{% for c in m.tool_calls or [] %}<call {{ c.function.name }}>{% endfor %}\n{% endfor %}assistant:"
)


@pytest.fixture
def chat_of(tmp_path: Path, known_rates: None) -> Any:
    metadata = {"tokenizer.chat_template": TEMPLATE}
    path = tiny_model(tmp_path / "tiny.gguf", "llama", n_vocab=512, metadata=metadata)
    with edgelm.load(path, memory=GB, backend="numpy", threads=1, context=512) as model:
        yield model.chat


def test_a_chat_calls_a_tool_and_goes_on_with_its_result(chat_of: Any) -> None:
    """The call is forced by the schema of the tools: what a random model says is no call."""
    tools = [
        {"name": "add", "parameters": {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"]}}
    ]
    tools[0]["parameters"]["additionalProperties"] = False  # type: ignore[index]
    chat = chat_of(tools=tools)
    assert "[add]" in chat.render("hello")
    chunks = list(chat.stream("hello", max_tokens=200, json_schema=call_schema(checked_tools(tools))))
    (call,) = chunks[-1].tool_calls
    assert call.name == "add"
    assert call.arguments["a"] in (1, 2)
    assert "".join(chunk.text for chunk in chunks) == ""
    assert all(not chunk.tool_calls for chunk in chunks[:-1])
    assert chat.messages[-1]["tool_calls"][0]["function"] == {"name": "add", "arguments": call.arguments}
    chunks = list(chat.tool_results([(call, "3")], max_tokens=5, ignore_eos=True))
    assert chunks[-1].tool_calls == ()
    assert [one["role"] for one in chat.messages] == ["user", "assistant", "tool", "assistant"]
    assert "<call add>" in chat.render("and")
    with pytest.raises(ConfigError, match="no result"):
        chat.tool_results([])


def test_without_tools_nothing_is_held_back(chat_of: Any) -> None:
    chat = chat_of()
    text = "".join(chunk.text for chunk in chat.stream("x", max_tokens=60, regex=r'\{"name": "add"\}'))
    assert text == '{"name": "add"}'
    assert "tool_calls" not in chat.messages[-1]


def test_a_template_that_leaves_tools_out_is_announced(chat_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tools = [{"name": "add"}]
    chat_of(tools=tools)  # its template shows them: no warning, which would be an error here
    monkeypatch.setattr(chat_of.__self__.template, "_template", "{% for m in messages %}{{ m.content }}{% endfor %}")
    monkeypatch.setattr(chat_of.__self__.template, "_compiled", None)
    chat_of()
    with pytest.warns(edgelm.ToolsIgnored, match=r"leaves tools out.*json_schema") as caught:
        chat = chat_of(tools=tools)
    assert caught[0].filename == __file__
    chunks = list(chat.stream("x", max_tokens=200, json_schema=call_schema(checked_tools(tools))))
    assert chunks[-1].tool_calls[0].name == "add"


@pytest.mark.parametrize(
    "spelled",
    [
        ("I look.", "[TOOL_CALLS]", "get_weather", "[CALL_ID]", "a1", "[ARGS]", '{"city": "Paris", "days": 2}'),
        ("I look.", "<|tool_call|>", f"[{JSON}]", "<|/tool_call|>"),
        ("I look.", "<start_function_call>", "call:get_weather{city:", "<escape>", "Paris", "<escape>", ",days:2}"),
    ],
)
def test_marks_that_are_control_tokens_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, known_rates: None, spelled: tuple[str, ...]
) -> None:
    """A text leaves control tokens out; a call could not be told from other text without them."""
    vocab = gpt2_vocab("gpt-2")
    vocab["tokenizer.ggml.tokens"] += MARKS
    vocab["tokenizer.ggml.token_type"] = [*vocab["tokenizer.ggml.token_type"].tolist(), *[CONTROL] * len(MARKS)]
    path = tiny_model(tmp_path / "tiny.gguf", "llama", metadata={**vocab, "tokenizer.chat_template": TEMPLATE})
    with edgelm.load(path, memory=GB, backend="numpy", threads=1, context=512) as model:
        ids = [token for part in spelled for token in model.tokenizer.encode(part, parse_special=True, add_bos=False)]

        def said(*_: Any, **__: Any) -> Generator[int, None, str]:
            yield from ids
            return "stop"

        monkeypatch.setattr("edgelm.model.token_ids", said)
        chunks = list(model.chat(tools=[{"name": "get_weather"}]).stream("hello"))
        assert "".join(chunk.text for chunk in chunks) == "I look."
        assert chunks[-1].tool_calls == (WEATHER,)
        assert "[TOOL_CALLS]" not in model.chat().send("hello")
