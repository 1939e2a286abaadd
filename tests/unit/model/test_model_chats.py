"""The public model: chats."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from streams import load, text

import edgelm
from edgelm import Model


def test_a_chat_keeps_its_history_and_computes_only_what_is_new(model_file: Path) -> None:
    with load(model_file, context=256) as model:
        chat = model.chat("Be brief.")
        list(chat.stream("the cat", max_tokens=4))
        chunks = list(chat.stream("the dog", max_tokens=4))
        assert [message["role"] for message in chat.messages] == [
            "system", "user", "assistant", "user", "assistant",
        ]  # fmt: skip
        assert chat.messages[3]["content"] == "the dog"
        assert chat.messages[4]["content"] == text(chunks)
        assert chunks[-1].usage.cached_tokens > 5
        assert "the dog" in chat.render("more")
        chat.clear()
        assert chat.messages == [{"role": "system", "content": "Be brief."}]


def test_a_full_chat_is_an_error_that_changes_nothing(model: Model) -> None:
    chat = model.chat()
    chat.send("the cat", max_tokens=3)
    before = list(chat.messages)
    with pytest.raises(edgelm.ContextOverflow) as caught:
        chat.send("the dog " * 100)
    assert caught.value.n_context == 128 < caught.value.n_prompt_tokens
    assert chat.messages == before


def test_trimming_drops_the_oldest_turns_and_keeps_the_system(model: Model) -> None:
    chat = model.chat("Hm.", overflow="trim")
    for i in range(8):
        list(chat.stream(f"the cat {i}", max_tokens=8))
    contents = [message["content"] for message in chat.messages]
    assert contents[0] == "Hm."
    assert "the cat 7" in contents
    assert "the cat 0" not in contents
    assert [message["role"] for message in chat.messages[1:3]] == ["user", "assistant"]


def test_a_turn_that_fails_leaves_a_trimmed_chat_as_it_was(model: Model) -> None:
    chat = model.chat(overflow="trim")
    for i in range(8):
        chat.send(f"the cat {i}", max_tokens=8)
    before = list(chat.messages)
    with pytest.raises(edgelm.ContextOverflow):
        chat.send("the dog " * 100)
    assert chat.messages == before

    seen: list[int] = []

    def fail(history: Any, logits: Any) -> Any:
        seen.append(len(history))
        if len(seen) == 3:
            raise RuntimeError("in the middle of an answer")
        return logits

    with pytest.raises(RuntimeError):
        chat.send("the end of it", processors=[fail], max_tokens=20, ignore_eos=True)
    assert chat.messages == before


def test_a_cancelled_turn_keeps_the_text_so_far_if_there_is_any(model: Model) -> None:
    chat = model.chat()
    stream = chat.stream("the cat", max_tokens=20, ignore_eos=True)
    said = next(stream).text + next(stream).text
    model.cancel()
    rest = list(stream)
    assert rest[-1].finish_reason == "cancelled"
    assert chat.messages[-1] == {"role": "assistant", "content": said + text(rest)}
    chat.clear()
    stream = chat.stream("the cat")
    model.cancel()
    assert [chunk.finish_reason for chunk in stream] == ["cancelled"]
    assert chat.messages == []


def test_an_unknown_policy_is_refused(model: Model) -> None:
    with pytest.raises(edgelm.ConfigError, match="'trim'"):
        model.chat(overflow="drop")  # type: ignore[arg-type]
