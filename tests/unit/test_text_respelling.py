"""Answers keep the tokens that the model chose for them, where the tokenizer would choose others."""

from __future__ import annotations

import random

import pytest
from text_samples import as_header

from edgelm.testing.tiny_vocab import gpt2_vocab, llama_vocab
from edgelm.text.build import build_tables
from edgelm.text.respelling import respelled
from edgelm.text.tables import Tables
from edgelm.text.tokenizer import Tokenizer


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    metadata = gpt2_vocab("gpt-2") if request.param == "gpt2" else llama_vocab()
    return Tokenizer(Tables(b"".join(build_tables(as_header(metadata).metadata))))


def letters(tokenizer: Tokenizer, text: str) -> list[int]:
    """Return the ids of a text in the smallest tokens there are."""
    small = {
        tokenizer.token_bytes(token): token for token in range(tokenizer.n_vocab) if not tokenizer.is_special(token)
    }
    return [small[bytes((byte,))] for byte in text.encode()]


def text_of(tokenizer: Tokenizer, ids: list[int]) -> bytes:
    return b"".join(map(tokenizer.token_bytes, ids))


def test_what_was_said_keeps_its_tokens_and_the_rest_has_its_own(tokenizer: Tokenizer) -> None:
    asked = tokenizer.encode("the cat sat on", add_bos=True)
    said = letters(tokenizer, " the mat")
    rendered = tokenizer.encode("the cat sat on the mat", add_bos=True)
    end = [tokenizer.eos_id or 0, *tokenizer.encode("and the dog", add_bos=False)]
    assert rendered != [*asked, *said]
    assert respelled(tokenizer, [*rendered, *end], [*asked, *said]) == [*asked, *said, *end]


def test_two_answers_that_were_spelled_oddly_both_stay(tokenizer: Tokenizer) -> None:
    end = tokenizer.eos_id or 0
    known = [*letters(tokenizer, "the cat"), end, *tokenizer.encode("sat", add_bos=False), end]
    known += letters(tokenizer, "on the")
    plain = [*letters(tokenizer, "the"), *letters(tokenizer, " cat"), end, *tokenizer.encode("sat", add_bos=False), end]
    new = [*plain, *letters(tokenizer, "on the"), end]
    assert respelled(tokenizer, new, known) == [*known, end]


def test_another_text_is_left_from_where_it_differs(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("the cat sat on the mat", add_bos=True)
    assert respelled(tokenizer, ids, []) == ids
    assert respelled(tokenizer, ids, tokenizer.encode("a dog", add_bos=True)) == ids
    assert respelled(tokenizer, [], ids) == []
    other = [*tokenizer.encode("the cat ", add_bos=True), *letters(tokenizer, "slept")]
    found = respelled(tokenizer, ids, other)
    assert text_of(tokenizer, found) == text_of(tokenizer, ids)


def test_a_special_token_is_not_what_spells_its_name(tokenizer: Tokenizer) -> None:
    end = tokenizer.eos_id or 0
    name = tokenizer.token_bytes(end).decode()
    spelled = letters(tokenizer, name)
    before = tokenizer.encode("the cat", add_bos=True)
    assert respelled(tokenizer, [*before, end, 5], [*before, *spelled]) == [*before, end, 5]
    assert respelled(tokenizer, [*before, *spelled], [*before, end, 5]) == [*before, *spelled]


def test_the_text_stays_the_same_whatever_was_known(tokenizer: Tokenizer) -> None:
    rng = random.Random(1)
    end = tokenizer.eos_id or 0
    for _ in range(300):
        words = [rng.choice(["the", " cat", " sat", "\n\n", "é", "a", "  "]) for _ in range(6)]
        ids = [*tokenizer.encode("".join(words), add_bos=True), end]
        cut = rng.randrange(len(words) + 1)
        known = tokenizer.encode("".join(words[:cut]), add_bos=True) + letters(tokenizer, "".join(words[cut:]))
        if rng.random() < 0.5:
            known = known[: rng.randrange(len(known) + 1)]
        found = respelled(tokenizer, ids, known)
        assert text_of(tokenizer, found) == text_of(tokenizer, ids)
        assert found[-1] == end
        again = respelled(tokenizer, ids, found)
        assert again == found
