"""Answers in a form: every answer that ends has it, and whatever cannot be a form is one sentence."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest

import edgelm
from edgelm import opening
from edgelm.errors import BudgetTooSmall, ConfigError
from edgelm.memory.predict import Rates
from edgelm.sizes import GB
from edgelm.structured import Forms
from edgelm.testing import tiny_model

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 5}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.fixture(autouse=True)
def _measured_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opening, "measured_rates", lambda *_, **__: Rates(1e9, 1e9, wide_bytes_per_s=1e12))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("model")
    return {name: tiny_model(folder / f"{name}.gguf", name, n_vocab=512) for name in ("llama", "qwen2")}


@pytest.fixture(params=["llama", "qwen2"])
def model(files: dict[str, Path], request: pytest.FixtureRequest) -> Iterator[edgelm.Model]:
    """Both kinds of vocabulary."""
    with edgelm.load(files[request.param], memory=GB, backend="numpy", threads=1, context=512) as model:
        yield model


def answer(model: edgelm.Model, **options: Any) -> tuple[str, str | None]:
    chunks = list(model.stream("the cat", **{"max_tokens": 200, **options}))
    return "".join(chunk.text for chunk in chunks), chunks[-1].finish_reason


@pytest.mark.parametrize("options", [{}, {"temperature": 1.5, "seed": 3, "top_k": 0}, {"speculate": False}])
def test_an_answer_is_valid_against_its_schema(model: edgelm.Model, options: dict[str, Any]) -> None:
    text, reason = answer(model, json_schema=SCHEMA, **options)
    assert reason == "stop"
    jsonschema.validate(json.loads(text), SCHEMA)


def test_guesses_change_nothing_and_forced_tokens_come_in_one_pass(model: edgelm.Model) -> None:
    plain = list(model.stream("the cat", max_tokens=200, json_schema=SCHEMA, speculate=False))
    guessed = list(model.stream("the cat", max_tokens=200, json_schema=SCHEMA))
    assert [chunk.token_id for chunk in guessed] == [chunk.token_id for chunk in plain]
    assert guessed[-1].usage.accepted_tokens > 0
    assert guessed[-1].usage.passes < plain[-1].usage.passes


def test_a_schema_that_allows_everything_still_makes_json(model: edgelm.Model) -> None:
    text, reason = answer(model, json_schema=True, temperature=1.0, seed=2)
    assert text[0] in '{["-0123456789tfn'
    if reason == "stop":
        json.loads(text)


def test_expressions_and_both_notations_of_grammars(model: edgelm.Model) -> None:
    assert re.fullmatch(r"[0-9]{3}-[a-c]{2}", answer(model, regex=r"[0-9]{3}-[a-c]{2}")[0])
    assert answer(model, grammar='root ::= "yes" | "no"')[0] in ("yes", "no")
    assert answer(model, grammar='start: "ab" "c"')[0] == "abc"


def test_an_answer_that_is_cut_off_says_so(model: edgelm.Model) -> None:
    text, reason = answer(model, regex="[a-z]{100}", max_tokens=5)
    assert reason == "length"
    assert re.fullmatch("[a-z]*", text)


def test_a_form_is_kept_although_ends_are_ignored(model: edgelm.Model) -> None:
    assert answer(model, regex="(a|b)", ignore_eos=True) in (("a", "stop"), ("b", "stop"))


def test_several_answers_do_not_disturb_each_other(model: edgelm.Model) -> None:
    for _ in range(2):
        assert answer(model, regex="[ab]{4}")[1] == "stop"
    first = model.stream("the cat", max_tokens=50, regex="[ab]{8}")
    next(first)
    first.close()
    assert re.fullmatch("[ab]{4}", answer(model, regex="[ab]{4}")[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"regex": "a(b"}, "makes no sense.*unclosed|invalid regex"),
        ({"json_schema": {"if": {}}}, "not supported.*if"),
        ({"json_schema": {"oneOf": [{"type": "string"}, {"minLength": 2}]}}, "not supported; write anyOf"),
        ({"json_schema": False}, "allows no answer"),
        ({"json_schema": {"allOf": [{"type": "string"}, {"type": "integer"}]}}, "allows no answer at all.*contradict"),
        ({"json_schema": [["type", "string"]]}, "no JSON object.*list"),
        ({"json_schema": {"type": "nope"}}, "makes no sense.*nope"),
        ({"json_schema": {"enum": {1, 2}}}, "no JSON object"),
        ({"grammar": "root ::= ("}, "GBNF grammar makes no sense.*line 1"),
        ({"grammar": "start: foo"}, 'unknown name: "foo"'),
        ({"regex": "a", "grammar": 'start: "a"'}, "give one of"),
    ],
)
def test_what_is_no_form_is_a_sentence(model: edgelm.Model, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        answer(model, **options)
    assert answer(model, max_tokens=2)[1] == "length"  # nothing was broken


def test_the_library_counts_against_the_budget(files: dict[str, Path]) -> None:
    with edgelm.load(files["llama"], memory=GB, backend="numpy", threads=1, context=64) as model:
        before = model.plan.planned_bytes
        answer(model, regex="ab", max_tokens=10)
        assert model.plan.planned_bytes == before + Forms.memory_bytes(model.tokenizer)
        assert model.set_budget(GB - 1).planned_bytes == model.plan.planned_bytes > before
    with edgelm.load(files["llama"], memory=before + 5_000_000, backend="numpy", threads=1, context=64) as model:
        with pytest.raises(BudgetTooSmall):
            answer(model, regex="ab", max_tokens=10)
        assert answer(model, max_tokens=2)[1] == "length"


def test_a_missing_library_is_a_sentence(model: edgelm.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(ConfigError, match=r"pip install 'edgelm\[structured\]'"):
        answer(model, regex="ab")


def test_an_unknown_option_still_has_a_name(model: edgelm.Model) -> None:
    with pytest.raises(ConfigError, match=r"unknown option 'schema'.*json_schema"):
        answer(model, schema=SCHEMA)
