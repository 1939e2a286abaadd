"""An answer in a form ends before its limit wherever an end fits, and is left alone wherever it would end anyway."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import edgelm
from edgelm import closing, opening, structured
from edgelm.closing import SLACK, Bytes, short_end
from edgelm.engine.sampling import Logits
from edgelm.memory.predict import Rates
from edgelm.sizes import GB
from edgelm.structured import Forms, form_of
from edgelm.testing import tiny_model

ANYTHING: dict[str, Any] = {}
NESTED = {"$defs": {"list": {"type": "array", "items": {"$ref": "#/$defs/list"}}}, "$ref": "#/$defs/list"}
RECORD = {
    "type": "object",
    "properties": {
        "text": {"type": "string"},
        "n": {"type": "number", "minimum": 20},
        "kind": {"enum": ["red", "green"]},
        "code": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]+$"},
    },
    "required": ["text", "n", "kind", "code"],
}
LIST = {"type": "array", "items": {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}}
EMAIL = {"type": "string", "format": "email"}
SAMPLING: tuple[dict[str, Any], ...] = ({}, {"temperature": 1.5, "seed": 1, "top_k": 0})


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("model")
    return {name: tiny_model(folder / f"{name}.gguf", name, n_vocab=512) for name in ("llama", "qwen2")}


@pytest.fixture(params=["llama", "qwen2"], scope="module")
def model(files: dict[str, Path], request: pytest.FixtureRequest) -> Iterator[edgelm.Model]:
    """Both kinds of vocabulary."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(opening, "measured_rates", lambda *_, **__: Rates(1e9, 1e9, wide_bytes_per_s=1e12))
        with edgelm.load(files[request.param], memory=GB, backend="numpy", threads=1, context=512) as model:
            yield model


def chunks_of(model: edgelm.Model, max_tokens: int, **options: Any) -> list[edgelm.Chunk]:
    return list(model.stream("the cat", max_tokens=max_tokens, **options))


def ids_of(chunks: Sequence[edgelm.Chunk]) -> list[int | None]:
    return [chunk.token_id for chunk in chunks]


def text_of(chunks: Sequence[edgelm.Chunk]) -> str:
    return "".join(chunk.text for chunk in chunks)


@pytest.mark.parametrize("sampling", SAMPLING)
@pytest.mark.parametrize("max_tokens", [70, 130])
@pytest.mark.parametrize("schema", [ANYTHING, NESTED, RECORD, LIST, {"type": "string", "minLength": 30}, EMAIL])
def test_an_answer_ends_before_its_limit_and_is_valid(
    model: edgelm.Model, schema: dict[str, Any], max_tokens: int, sampling: dict[str, Any]
) -> None:
    chunks = chunks_of(model, max_tokens, json_schema=schema, **sampling)
    assert chunks[-1].finish_reason == "stop"
    assert chunks[-1].usage.completion_tokens < max_tokens
    jsonschema.validate(json.loads(text_of(chunks)), schema)


def test_what_is_not_found_is_seldom_searched_for(model: edgelm.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    searches: list[int] = []

    def nothing(state: Any, alphabet: Bytes, end: int, most: int, known: Any = (), states: int = 0) -> None:
        searches.append(most)

    monkeypatch.setattr(closing, "short_end", nothing)
    assert chunks_of(model, 200, json_schema=NESTED)[-1].finish_reason == "length"
    assert len(searches) < 20


def test_only_an_answer_that_was_shortened_says_so(model: edgelm.Model) -> None:
    assert chunks_of(model, 40, json_schema={"type": "string"})[-1].closed
    assert not chunks_of(model, 40, json_schema={"type": "boolean"})[-1].closed
    assert not chunks_of(model, 40)[-1].closed


@pytest.mark.parametrize("form", [{"regex": "([a-z]+ )+[0-9]{2}"}, {"grammar": 'root ::= "(" root* ")" | [0-9]'}])
def test_other_forms_are_ended_too(model: edgelm.Model, form: dict[str, str]) -> None:
    for max_tokens in (15, 60):
        chunks = chunks_of(model, max_tokens, **form)
        assert chunks[-1].finish_reason == "stop"
        text = text_of(chunks)
        if "regex" in form:
            assert re.fullmatch(form["regex"], text)
        else:
            assert text.count("(") == text.count(")")


@pytest.mark.parametrize("form", [{"json_schema": RECORD}, {"regex": "[a-z]{60}"}])
def test_where_no_end_fits_an_answer_is_cut_off(model: edgelm.Model, form: dict[str, Any]) -> None:
    last = chunks_of(model, 6, **form)[-1]
    assert (last.finish_reason, last.closed, last.usage.completion_tokens) == ("length", False, 6)


def test_the_shortest_answer_needs_one_token_for_its_end(model: edgelm.Model) -> None:
    assert chunks_of(model, 2, regex="a+")[-1].finish_reason == "stop"
    assert chunks_of(model, 1, regex="a+")[-1].finish_reason == "length"


@pytest.mark.parametrize("schema", [ANYTHING, RECORD, LIST, {"type": "string"}])
def test_far_from_the_limit_nothing_changes(model: edgelm.Model, schema: dict[str, Any]) -> None:
    near, far = (ids_of(chunks_of(model, limit, json_schema=schema)) for limit in (150, 300))
    n = 150 - SLACK - 50  # ends of these are shorter than 50 tokens
    assert near[:n] == far[:n]


def test_an_answer_that_ends_anyway_stays_as_it_is(model: edgelm.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    schema = {"type": "array", "items": {"type": "integer", "maximum": 99, "minimum": 0}, "minItems": 3, "maxItems": 3}
    checked = chunks_of(model, 40, json_schema=schema)
    assert not checked[-1].closed
    monkeypatch.setattr(structured.Ending, "taken", lambda self, state, token, n_left: token)
    assert ids_of(checked) == ids_of(chunks_of(model, 40, json_schema=schema))


@pytest.mark.parametrize("sampling", SAMPLING)
def test_guesses_change_nothing(model: edgelm.Model, sampling: dict[str, Any]) -> None:
    plain, guessed = (
        chunks_of(model, 60, json_schema=RECORD, speculate=speculate, **sampling) for speculate in (False, True)
    )
    assert plain[-1].finish_reason == "stop"
    assert ids_of(plain) == ids_of(guessed)


def test_a_full_context_is_a_limit_too(model: edgelm.Model) -> None:
    assert list(model.stream("the cat " * 50, json_schema=NESTED))[-1].finish_reason == "stop"


def test_samples_side_by_side_end_as_well(files: dict[str, Path]) -> None:
    with edgelm.load(files["llama"], memory=GB, backend="numpy", threads=1, context=512, parallel=3) as model:
        for n in (1, 3):
            for sample in model.samples("the cat", n, max_tokens=40, json_schema={"type": "string"}, logit_bias={}):
                assert (sample.finish_reason, sample.closed) == ("stop", True)
                assert isinstance(json.loads(sample.text), str)


VALUES = st.recursive(
    st.sampled_from([
        {"type": "string"}, {"type": "integer"}, {"type": "number", "minimum": 3}, {"enum": ["abc", 12, None]}, {},
        {"type": "string", "minLength": 4}, {"const": {"k": [1]}}, {"type": ["null", "boolean"]},
    ]),
    lambda inner: st.one_of(
        st.builds(lambda items, n: {"type": "array", "items": items, "minItems": n}, inner, st.integers(0, 2)),
        st.builds(
            lambda values, n: {"type": "object", "properties": values, "required": sorted(values)[:n]},
            st.dictionaries(st.sampled_from(["a", "name", "x y"]), inner, max_size=3), st.integers(0, 3),
        ),
        st.builds(lambda one, other: {"anyOf": [one, other]}, inner, inner),
    ),
    max_leaves=4,
)  # fmt: skip


@settings(max_examples=40, deadline=None)
@given(schema=VALUES, seed=st.integers(0, 1000), most=st.integers(2, 90))
def test_random_answers_to_random_schemas_end_if_the_shortest_fits(
    model: edgelm.Model, schema: dict[str, Any], seed: int, most: int
) -> None:
    tokenizer, generator = model.tokenizer, np.random.default_rng(seed)

    def drawn(logits: Logits, history: Sequence[int]) -> int:
        return int(generator.choice(np.flatnonzero(logits > -np.inf)))

    n = 512
    forms = Forms(tokenizer, n)
    form = form_of(schema, None, None)
    assert form is not None
    sampler = forms.constrain(drawn, form, 0, most)
    least = short_end(
        sampler._matcher.deep_copy(), Bytes([tokenizer.token_bytes(i) for i in range(n)]), min(tokenizer.eos_ids), most
    )
    history: list[int] = []
    while len(history) < most and not tokenizer.eos_ids.intersection(history):
        history.append(sampler(np.zeros(n, np.float32), history))
    ended = history[-1] in tokenizer.eos_ids
    assert ended or least is None
    if ended:
        text = b"".join(tokenizer.token_bytes(i) for i in history[:-1])
        jsonschema.validate(json.loads(text), schema)
