"""Find calls of tools in an answer, in the forms that the families of models write them.

Knows texts and JSON, no model: what marks a call differs, what it holds is a name and arguments. A call counts if a
tool of that name was offered; everything else stays text.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from edgelm.errors import ConfigError

if TYPE_CHECKING:
    from edgelm.text.tokenizer import Tokenizer

OPENERS = (
    "<tool_call>",  # Hermes, Qwen, SmolLM3, Granite
    "<tool_calls>",  # Apriel
    "<TOOLCALL>",  # Nemotron
    "<|tool_call|>",  # Granite 3, Phi-4-mini
    "<|python_tag|>",  # Llama 3
    "<function=",  # Llama 3, Functionary
    "[TOOL_CALLS]",  # Mistral
    "functools[",  # Phi-3.5, Phi-4, FireFunction
    "<｜tool▁calls▁begin｜>",  # DeepSeek R1
    "<｜tool▁call▁begin｜>",
    "<start_function_call>",  # FunctionGemma
    "```tool_code",  # Gemma
    "```tool_call",
    "```json",
)
MARKS = (
    "<tool_call>", "</tool_call>", "<|tool_call|>", "<|/tool_call|>", "<|python_tag|>", "[TOOL_CALLS]", "[CALL_ID]",
    "[ARGS]", "<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>",
    "<｜tool▁calls▁end｜>", "<start_function_call>", "<end_function_call>", "<escape>",
    "<start_function_response>",
)  # fmt: skip
"""Texts that vocabularies may have as control tokens, which a text leaves out: without them a call cannot be told."""
_BETWEEN = re.compile(
    r"(?:[\s;,]|</?tool_calls?>|</?TOOLCALL>|<\|/?tool_call\|>|<\|python_tag\|>|\[TOOL_CALLS\](?=\s*[\[{])"
    r"|functools(?=\[)|```(?:tool_code|tool_call|json)?|</function>|<end_function_call>"
    r"|<｜tool▁call▁end｜>|<｜tool▁calls▁(?:begin|end)｜>)*"
)
_NAMED = re.compile(  # calls whose name stands before the JSON
    r"<function=([\w.-]+)>?\s*|\[TOOL_CALLS\]\s*([\w.-]+)(?:\[CALL_ID\]\w*)?(?:\[ARGS\])?\s*"
    r"|<｜tool▁call▁begin｜>\w*<｜tool▁sep｜>([\w.-]+)\s*(?:```json\s*)?|<start_function_call>\s*call:([\w.-]+)\s*",
    re.ASCII,
)
_CLOSERS = ("```", "</tool_call>", "<|/tool_call|>")
_BARE_KEY = re.compile(r"([{,]\s*)([\w.$-]+)\s*:")
_OPENER = re.compile("|".join(map(re.escape, OPENERS)))
_DECODER = json.JSONDecoder()


class ToolCall(NamedTuple):
    """A call that a model asks for: the tool's name, and its arguments by name."""

    name: str
    arguments: dict[str, Any]


def checked_tools(tools: Iterable[Mapping[str, Any]]) -> tuple[dict[str, Any], ...]:
    """Return tools as `{"type": "function", "function": {...}}`; raise `ConfigError` for what is none."""
    found = []
    for number, tool in enumerate(tools, 1):
        function = tool.get("function", tool) if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str) or not function["name"]:
            raise ConfigError(f"tool {number} has no name; give {{'name': ..., 'description': ..., 'parameters': ...}}")
        parameters = function.get("parameters", {"type": "object", "properties": {}})
        if not isinstance(parameters, Mapping):
            raise ConfigError(f"the parameters of tool {function['name']!r} are no JSON schema")
        found.append({"type": "function", "function": {**function, "parameters": dict(parameters)}})
    return tuple(found)


def call_schema(tools: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the JSON schema of a call of one of these tools, for `json_schema`: it forces one."""
    calls = []
    for tool in checked_tools(tools):
        function = tool["function"]
        properties = {"name": {"const": function["name"]}, "arguments": function["parameters"]}
        calls.append(
            {"type": "object", "properties": properties, "required": [*properties], "additionalProperties": False}
        )
    return calls[0] if len(calls) == 1 else {"anyOf": calls}


def hidden_marks(tokenizer: Tokenizer) -> dict[int, str]:
    """Return the marks of calls that this vocabulary has as control tokens, by id."""
    ids = {mark: tokenizer.find(mark) for mark in MARKS}
    return {token: mark for mark, token in ids.items() if token is not None and tokenizer.is_special(token)}


class ToolCallMatcher:
    """Passes text on until a call may have begun; then everything waits for the end of the answer."""

    def __init__(self, names: Iterable[str]) -> None:
        self._names = frozenset(names)
        self._shown = self._held = ""
        self._waits = False

    def feed(self, piece: str) -> str:
        """Return the text that is surely no call."""
        self._held += piece
        if self._waits:
            return ""
        text = self._held
        opener = _OPENER.search(text)
        at = opener.start() if opener else -1
        bare = text.lstrip()
        if not self._shown.strip() and bare[:1] in ("{", "["):
            at = len(text) - len(bare)
        if at >= 0:
            self._waits = True
        else:
            at = len(text) - _unfinished(text)
        ready, self._held = text[:at], text[at:]
        self._shown += ready
        return ready

    def flush(self) -> tuple[str, tuple[ToolCall, ...]]:
        """Return the rest of the text, and the calls; of a rest that is calls no text is left.

        What began like a call and is none, such as an example in a thought, is text before the calls.
        """
        rest, self._held = self._held, ""
        for at in sorted({0, *(found.start() for found in _OPENER.finditer(rest))}):
            if calls := parse_calls(rest[at:], self._names):
                return rest[:at], calls
        return rest, ()


def parse_calls(text: str, names: frozenset[str]) -> tuple[ToolCall, ...]:
    """Return the calls of tools of these names that `text` is made of; none if it is made of anything else."""
    calls = [_call(value) for value in _json_values(_unescaped(text)) or _python_values(text)]
    if not calls or any(call is None or call.name not in names for call in calls):
        return ()
    return tuple(call for call in calls if call is not None)


def _json_values(text: str) -> list[Any]:
    """Return the calls and other values that follow each other in a text, arrays taken apart.

    Empty if it is not only that.
    """
    values: list[Any] = []
    at = _between(text, 0)
    while at < len(text):
        named = _NAMED.match(text, at)
        try:
            value, at = _DECODER.raw_decode(text, named.end() if named else at)
        except (ValueError, RecursionError):
            return []
        if named:
            values.append({"name": named[named.lastindex or 0], "arguments": value})
        else:
            values.extend(value if isinstance(value, list) else [value])
        at = _between(text, at)
    return values


def _between(text: str, at: int) -> int:
    """Return where what only marks calls, or stands between them, ends."""
    found = _BETWEEN.match(text, at)
    return found.end() if found else at


def _unescaped(text: str) -> str:
    """Return FunctionGemma's `call:f{a:<escape>b<escape>}` with the braces as JSON; other texts as they are."""
    if "<start_function_call>" not in text:
        return text
    text = text.partition("<start_function_response>")[0]  # what follows the model made up
    parts = text.split("<escape>")
    if any('"' in part for part in parts[::2]):
        return text
    parts[::2] = [_BARE_KEY.sub(r'\1"\2":', part) for part in parts[::2]]
    parts[1::2] = [json.dumps(part, ensure_ascii=False) for part in parts[1::2]]
    return "".join(parts)


def _python_values(text: str) -> list[Any]:
    """Return calls written as Python, `f(a=1)` or a list of them, as values; nothing is evaluated but literals."""
    text = text[_between(text, 0) :].rstrip()
    for closer in _CLOSERS:
        text = text.removesuffix(closer).rstrip()
    try:
        tree = ast.parse(text, mode="eval").body
        calls = tree.elts if isinstance(tree, ast.List) else [tree]
        return [
            {
                "name": ast.unparse(call.func),
                "arguments": {key.arg: ast.literal_eval(key.value) for key in call.keywords},
            }
            for call in calls
            if isinstance(call, ast.Call) and not call.args
        ]
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return []


def _call(value: Any) -> ToolCall | None:
    if not isinstance(value, dict):
        return None
    inner = value.get("function")
    value = inner if isinstance(inner, dict) else value
    name = value.get("name")
    arguments: Any = next((value[key] for key in ("arguments", "parameters") if key in value), {})
    if isinstance(arguments, str):  # some write the JSON as a text
        try:
            arguments = json.loads(arguments)
        except ValueError:
            return None
    if not isinstance(name, str) or not isinstance(arguments, dict) or None in arguments:
        return None
    return ToolCall(name, arguments)


def _unfinished(text: str) -> int:
    """Return the length of the longest end of `text` that an opener begins with."""
    longest = max(map(len, OPENERS)) - 1
    for n in range(min(longest, len(text)), 0, -1):
        if any(opener.startswith(text[-n:]) for opener in OPENERS):
            return n
    return 0
