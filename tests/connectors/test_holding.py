"""One model is held at a time, conversations go on in their cache, and schemas are closed."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from edgelm import Chunk
from edgelm.errors import ConfigError, DownloadError
from edgelm_apps import holding
from edgelm_apps.holding import Question, answer, closed

ENGINE = {"memory": "2GB", "backend": "numpy", "threads": 1, "context": 512}
CAT = {"role": "user", "content": "the cat and the dog"}


def ask(model: Path, messages: list[Any], **more: Any) -> tuple[str, Chunk]:
    options = {"max_tokens": 8, **more.pop("options", {})}
    chunks = list(answer(str(model), ENGINE, Question(messages, options, **more)))
    return "".join(chunk.text for chunk in chunks), chunks[-1]


def test_a_conversation_goes_on_where_it_was(models: list[Path]) -> None:
    text, first = ask(models[0], [CAT])
    _, second = ask(models[0], [CAT, {"role": "assistant", "content": text}, CAT])
    assert second.usage.cached_tokens >= first.usage.prompt_tokens + first.usage.completion_tokens - 1
    again, _ = ask(models[0], [CAT])
    assert again == text


def test_another_model_takes_its_place(models: list[Path]) -> None:
    texts = [ask(model, [CAT])[0] for model in (*models, *models)]
    assert texts[:2] == texts[2:]
    assert texts[0] != texts[1]


def test_another_model_waits_for_no_answer_that_is_left_half_read(models: list[Path]) -> None:
    half = answer(str(models[0]), ENGINE, Question([CAT], {"max_tokens": 8}))
    next(half)
    with pytest.raises(ConfigError, match="still answering, and one model is loaded at a time"):
        ask(models[1], [CAT])
    half.close()
    ask(models[1], [CAT])


def test_a_conversation_that_is_kept_goes_on_in_the_next_process(models: list[Path], tmp_path: Path) -> None:
    kept = tmp_path / "kept" / "one.json"
    text, first = ask(models[0], [CAT], kept=kept)
    holding.let_go()
    assert sorted(path.name for path in kept.parent.iterdir()) == ["one.json", "one.json.kv"]
    turn = [CAT, {"role": "assistant", "content": text}, CAT]
    _, second = ask(models[0], turn, kept=kept)
    assert second.usage.cached_tokens >= first.usage.prompt_tokens + first.usage.completion_tokens - 1
    holding.let_go()
    ask(models[0], [CAT], kept=kept.with_name("other.json"))
    holding.let_go()
    assert sorted(path.name for path in kept.parent.iterdir()) == ["other.json", "other.json.kv"]


def test_a_kept_conversation_that_is_damaged_is_computed_again(models: list[Path], tmp_path: Path) -> None:
    kept = tmp_path / "one.json"
    kept.write_text("{")
    assert ask(models[0], [CAT], kept=kept)[0] == ask(models[0], [CAT])[0]


def test_a_name_that_cannot_be_pulled(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(DownloadError, match="try `edgelm pull gemma-3-270m`"):
        list(answer("gemma-3-270m", ENGINE, Question([CAT], {})))
    assert "error:" in capfd.readouterr().err


def test_leaving_an_async_answer_stops_only_that(models: list[Path]) -> None:
    async def main() -> list[int]:
        async def count(most: int) -> int:
            question, n = Question([CAT], {"max_tokens": 40, "ignore_eos": True}), 0
            chunks = holding.aanswer(str(models[0]), ENGINE, question)
            async for chunk in chunks:
                n += chunk.token_id is not None
                if n == most:
                    break
            await chunks.aclose()
            return n

        return await asyncio.gather(count(100), count(3), count(100))

    assert asyncio.run(main()) == [40, 3, 40]


def test_schemas_are_closed_where_they_say_nothing() -> None:
    person = {"type": "object", "properties": {"properties": {"type": "string"}}}
    given = {"$defs": {"P": person}, "type": "array", "items": {"anyOf": [person, {"$ref": "#/$defs/P"}]}}
    shut = {**person, "additionalProperties": False}
    assert closed(given) == {"$defs": {"P": shut}, "type": "array", "items": {"anyOf": [shut, {"$ref": "#/$defs/P"}]}}
    for open_one in (
        {"properties": {}, "additionalProperties": True},
        {"properties": {}, "patternProperties": {"^x": {}}},
        {"properties": {}, "allOf": [person]},
        {"type": "object"},
    ):
        assert closed(open_one) == open_one
