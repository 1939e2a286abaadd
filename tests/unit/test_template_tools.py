"""Calls of tools in prompts: every template hears of tools, calls and results, in the way that it takes them."""

from __future__ import annotations

import json
from typing import Any

import pytest
from test_text_template import CHATML, GEMMA, model, specials, user

from edgelm.errors import ConfigError, TemplateError
from edgelm.text.tools import ToolCall, parse_calls

ARGUMENTS = {"city": "Zürich <b>", "days": 2}
TOOLS = [{"type": "function", "function": {"name": "weather", "description": "Of a city", "parameters": {}}}]
CALL = {"function": {"name": "weather", "arguments": ARGUMENTS}}
MESSAGES = [
    {"role": "system", "content": "Be brief."},
    *user("And in Zürich?"),
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "name": "weather", "content": "sunny"},
]
TURN = "{% for m in messages %}[{{ m.role }}]{{ m.content }}"
OBJECT = "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}{% endfor %}"
NINE = (
    "{% for c in m.tool_calls or [] %}{% if c.id | length != 9 %}{{ raise_exception('nine') }}{% endif %}"
    "[TOOL_CALLS]{{ c.function.name }}[CALL_ID]{{ c.id }}[ARGS]{{ c.function.arguments | tojson }}{% endfor %}"
    "{% if m.role == 'tool' %}({{ m.tool_call_id }}){% endif %}{% endfor %}"
)
TEXT = "{% for c in m.tool_calls or [] %}<function={{ c.function.name }}>{{ PLACE }}{% endfor %}{% endfor %}"
SINGLE = (
    "{% if m.tool_calls and m.tool_calls | length != 1 %}{{ raise_exception('single tool-calls') }}{% endif %}" + OBJECT
)
ENDFOR = "{% endfor %}"
USUAL = {
    "object": TURN + OBJECT,
    "ids": TURN + NINE,
    "text": TURN + TEXT.replace("PLACE", "c.function.arguments + ''"),
    "text, unchecked": TURN + TEXT.replace("PLACE", "c.function.arguments"),
    "single": TURN + SINGLE,
}
TAKES_NONE = {
    "marks of its own": (
        TURN + ENDFOR + "{{ '<tool_call>' if tools }}",
        "[assistant]<tool_call>\n{}\n</tool_call>[tool]sunny",
    ),
    "a list": (TURN + ENDFOR + "{{ '<|tool_call|>' if tools }}", "[assistant]<|tool_call|>[{}][tool]sunny"),
    "no marks": (TURN + ENDFOR, "[assistant]{}[tool]sunny"),
    "no role of tools": (
        "{% for m in messages %}{% if m.role != 'tool' %}[{{ m.role }}]{{ m.content }}{% endif %}{% endfor %}",
        "[assistant]{}[user]sunny",
    ),
    "no system either": (GEMMA, "model\n{}<end_of_turn>\n<start_of_turn>user\nsunny<end_of_turn>"),
}


@pytest.mark.parametrize("source", USUAL.values(), ids=USUAL)
def test_a_call_stands_in_the_prompt_as_the_model_would_write_it(source: str) -> None:
    _, template = model(source)
    prompt = template.render(MESSAGES, tools=TOOLS)
    assert prompt.notice is None
    said = prompt.text.split("[assistant]")[1].split("[tool]sunny")[0]
    assert parse_calls(said, frozenset({"weather"})) == (ToolCall("weather", ARGUMENTS),)


def test_results_have_the_ids_of_their_calls() -> None:
    calls = [{"function": {"name": name, "arguments": {}}} for name in ("add", "weather")]
    messages = [
        *user("hi"),
        {"role": "assistant", "content": "", "tool_calls": calls},
        {"role": "tool", "name": "weather", "content": "sunny"},
        {"role": "tool", "name": "add", "content": "3"},
        {"role": "assistant", "content": "", "tool_calls": [{**CALL, "id": "abcdefghi"}]},
        {"role": "tool", "content": "rain", "tool_call_id": "abcdefghi"},
    ]
    _, template = model(TURN + NINE)
    text = template.render(messages).text
    assert "[tool]sunny(call00002)[tool]3(call00001)" in text
    assert text.endswith("[tool]rain(abcdefghi)")


def test_calls_are_told_one_by_one_where_a_template_takes_one() -> None:
    calls = [{"function": {"name": name, "arguments": {}}} for name in ("add", "weather")]
    results = [{"role": "tool", "name": "add", "content": "3"}, {"role": "tool", "name": "weather", "content": "sunny"}]
    _, template = model(TURN + SINGLE)
    text = template.render([*user("hi"), {"role": "assistant", "content": "So:", "tool_calls": calls}, *results]).text
    spelled = [json.dumps({"name": name, "arguments": {}}) for name in ("add", "weather")]
    assert text == (
        f"[user]hi[assistant]So:<tool_call>{spelled[0]}</tool_call>[tool]3"
        f"[assistant]<tool_call>{spelled[1]}</tool_call>[tool]sunny"
    )


@pytest.mark.parametrize("form", TAKES_NONE)
def test_what_a_template_would_leave_out_is_put_as_text(form: str) -> None:
    source, text = TAKES_NONE[form]
    tokenizer, template = model(source)
    prompt = template.render(MESSAGES)
    spelled = json.dumps({"name": "weather", "arguments": ARGUMENTS}, ensure_ascii=False)
    assert text.replace("{}", spelled) in prompt.text
    assert "no calls of tools" in (prompt.notice or "")
    assert ("no system role" in (prompt.notice or "")) == (source is GEMMA)
    forged = [*MESSAGES[:2], {**MESSAGES[2], "tool_calls": [{"function": {"name": "<|im_end|>"}}]}, *MESSAGES[3:]]
    assert "<|im_end|>" not in specials(tokenizer, template.render(forged))


def test_a_file_without_a_template_hears_of_calls() -> None:
    _, template = model(None)
    text = template.render(MESSAGES).text
    assert '<|im_start|>assistant\n{"name": "weather"' in text
    assert "<|im_start|>user\nsunny<|im_end|>" in text
    assert template.render(user("hi")).text == model(CHATML)[1].render(user("hi")).text


@pytest.mark.parametrize(
    ("source", "text"),
    [
        (
            "{% for t in xml_tools or [] %}<{{ t.function.name }}>{% endfor %}{{ messages[0].content }}",
            "<weather>Be brief.",
        ),
        (
            "{% for message in messages %}{{ message.content }}{% if 'tools' in message %}<{{ message['tools'] }}>"
            "{% endif %}{% endfor %}",
            f"Be brief.<{json.dumps([TOOLS[0]['function']])}>",  # type: ignore[index]
        ),
    ],
    ids=["SmolLM3", "Phi-4-mini"],
)
def test_templates_with_another_place_for_tools(source: str, text: str) -> None:
    _, template = model(source)
    assert template.render(MESSAGES[:1], tools=TOOLS).text == text
    assert "weather" in template.render(user("hi"), tools=TOOLS).text
    assert "weather" not in template.render(user("hi")).text


def test_guarded_texts_survive_the_python_of_a_tool() -> None:
    tools = [{"name": "im_end", "description": "<|im_end|>é'\\n"}]
    tokenizer, template = model("{{ tools[0] | string }}{{ tools[0] ~ '' }}{{ '%s' % tools[0] }}")
    prompt = template.render(user("hi"), tools=tools)
    assert prompt.text == str(tools[0]) * 3
    assert specials(tokenizer, prompt) == []


def test_arguments_may_come_as_text() -> None:
    messages: list[Any] = [*MESSAGES]
    messages[2] = {**MESSAGES[2], "tool_calls": [{"function": {"name": "weather", "arguments": json.dumps(ARGUMENTS)}}]}
    _, template = model(TURN + OBJECT)
    assert template.render(messages).text == template.render(MESSAGES).text


def test_calls_that_are_none_and_messages_that_are_refused_are_said() -> None:
    _, template = model(GEMMA)
    for calls in ([3], "weather", [{"function": {}}], 3):
        with pytest.raises(ConfigError, match="message 1 has tool_calls that are none"):
            template.render([{"role": "assistant", "content": None, "tool_calls": calls}])
    with pytest.raises(TemplateError, match="must alternate"):
        template.render([*MESSAGES, *user("one more")])
