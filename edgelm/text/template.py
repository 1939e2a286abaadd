"""From chat messages to a prompt, by the file's own template or, where it has none, by a known turn format.

Special tokens come from the template only. Knows metadata keys and when to fall back; the template language is in
sandbox, the formats in fallbacks.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from edgelm.errors import TemplateError
from edgelm.text.fallbacks import FALLBACKS, PLAIN, Fallback, with_system_folded
from edgelm.text.messages import Guard, Message, checked_messages, texts_of
from edgelm.text.prompt import Prompt
from edgelm.text.tokenizer import Tokenizer
from edgelm.text.tool_turns import as_python, has_calls, readings, silenced, with_tools_told

if TYPE_CHECKING:
    from edgelm.text.build import ModelHeader
    from edgelm.text.sandbox import Sandbox

_STRUCTURAL = re.compile(r"<[|｜].*[|｜]>", re.DOTALL)
_TOOLS_IN_SYSTEM = "'tools' in message"  # Phi-4-mini
_FOLDED = "this model's template has no system role: the system text was put before the first user message"


def chat_template_for(model: ModelHeader, tokenizer: Tokenizer, *, source: str | None = None) -> ChatTemplate:
    """Return the chat template of an opened model, or the one given as `source`.

    A file without one gets a turn format that its vocabulary knows; `ChatTemplate.notice` then says so.
    """
    text = source if source is not None else model.metadata.get("tokenizer.chat_template")
    if isinstance(text, str) and text.strip():
        return ChatTemplate(tokenizer, template=text, origin="file" if source is None else "given")
    fallback = next((known for known in FALLBACKS if tokenizer.find(known.marker) is not None), PLAIN)
    return ChatTemplate(tokenizer, fallback=fallback)


class ChatTemplate:
    """Renders chats. `source` is `file`, `given` or `fallback:NAME`; `stops` are texts that end an answer."""

    def __init__(
        self, tokenizer: Tokenizer, *, template: str = "", origin: str = "file", fallback: Fallback | None = None
    ) -> None:
        self._tokenizer, self._template, self._fallback = tokenizer, template, fallback
        self._compiled: Sandbox | None = None
        self._all_specials: str | None = None
        self.source = origin if fallback is None else f"fallback:{fallback.name}"
        self.stops: tuple[str, ...] = fallback.stops if fallback else ()
        self.notice: str | None = None
        if fallback is not None:
            marks = f"its vocabulary has {fallback.marker}" if fallback.marker else "its vocabulary shows no other"
            self.notice = (
                f"the file has no chat template: using the {fallback.name} turn format, because {marks}; "
                "answers may suffer if the model was trained with another"
            )

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        extra: Mapping[str, Any] | None = None,
        allow_special: bool = False,
    ) -> Prompt:
        """Return the prompt for `messages`, ready for `Tokenizer.encode_prompt`.

        `tools` and `extra` are variables of the template. Texts in messages and tools never become special tokens,
        unless `allow_special`. Where the template refuses a system message, its text goes before the first user
        message and the prompt's `notice` says so. Raises `ConfigError` for malformed messages and `TemplateError`
        if the template fails or does more than a template may.
        """
        checked = checked_messages(messages)
        guard = None if allow_special else self._guard([*texts_of(checked), *texts_of(tools or []), self._template])
        if guard is not None:
            checked = [
                {key: value if key == "role" else guard.guard(value) for key, value in message.items()}
                for message in checked
            ]
            tools = guard.guard(list(tools)) if tools is not None else None
        text, notice = self._render(checked, add_generation_prompt, tools, extra or {})
        return Prompt(text, guard.originals if guard is not None else {}, notice)

    def _render(
        self, messages: list[dict[str, Any]], add_generation_prompt: bool, tools: Any, extra: Mapping[str, Any]
    ) -> tuple[str, str | None]:
        if self._fallback is not None:
            told, notice = [*readings(messages, "")][-1] if has_calls(messages) else (messages, None)
            return self._fallback.render(told, add_generation_prompt), notice
        from edgelm.text.sandbox import Refused, Sandbox

        if self._compiled is None:
            self._compiled = Sandbox(self._template)
        variables = {
            **self._special_names(),
            "tools": tools,
            "xml_tools": tools,  # SmolLM3's name for them
            "documents": None,
            **extra,
            "add_generation_prompt": add_generation_prompt,
        }
        if tools and _TOOLS_IN_SYSTEM in self._template:
            messages = with_tools_told(messages, tools)
        try:
            return self._told(self._compiled, messages, variables)
        except Refused as refused:
            if not any(message["role"] == "system" for message in messages):
                raise _refusal(refused) from refused
            try:
                text, notice = self._told(self._compiled, with_system_folded(messages), variables)
            except Refused as again:
                raise _refusal(again) from again
            return text, f"{_FOLDED}; {notice}" if notice else _FOLDED

    def _told(
        self, compiled: Sandbox, messages: list[dict[str, Any]], variables: Mapping[str, Any]
    ) -> tuple[str, str | None]:
        """Render messages, calls of tools in the first way in which the template leaves nothing of them out."""
        from edgelm.text.sandbox import Failed, Refused

        def rendered(told: list[dict[str, Any]]) -> str:
            return compiled.render({**variables, "messages": told})

        def heard(told: list[dict[str, Any]], text: str) -> bool:
            for other in silenced(told):
                with suppress(Refused, Failed):
                    if rendered(other) == text:
                        return False
            return not as_python(told, text)

        if not has_calls(messages):
            return rendered(messages), None
        partly: tuple[str, str | None] | None = None
        why: Exception | None = None
        for told, notice in readings(messages, self._template):
            try:
                text = rendered(told)
            except (Refused, Failed) as error:
                why = error
                continue
            if heard(told, text):
                return text, notice
            partly = partly or (text, notice)
        if partly is None:
            assert why is not None
            raise why
        return partly

    def _special_names(self) -> dict[str, str]:
        tokenizer = self._tokenizer
        ids = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id}
        return {
            name: "" if token is None else tokenizer.token_bytes(token).decode("utf-8", "replace")
            for name, token in ids.items()
        }

    def _guard(self, texts: Sequence[str]) -> Guard:
        if self._all_specials is None:
            known = self._tokenizer.special_tokens.items()
            self._all_specials = "\0" + "\0".join(text for text, token in known if self._shapes(text, token)) + "\0"
        return Guard(self._specials_in, self._all_specials, texts)

    def _specials_in(self, text: str) -> list[str]:
        found = self._tokenizer.specials_in(text)
        return [special for special in found if self._shapes(special, self._tokenizer.find(special))]

    def _shapes(self, special: str, token: int | None) -> bool:
        """Say whether a special token shapes the conversation: control tokens do, and user-defined ones that look so.

        Other user-defined tokens, such as runs of spaces or HTML tags, are how the vocabulary spells plain text.
        """
        if token is not None and self._tokenizer.is_special(token):
            return True
        if _STRUCTURAL.fullmatch(special):
            return True
        return special[:1] in "<[" and special[-1:] in ">]" and special in self._template


def _refusal(refused: Exception) -> TemplateError:
    return TemplateError(f"the chat template does not accept these messages: {' '.join(str(refused).split())[:300]}")
