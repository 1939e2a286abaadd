"""The tokenizers of folders give the ids of the tokenizers library."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from text_samples import as_header, pair_vocabulary, real_path, sample
from tokenizers import Tokenizer as Theirs

from edgelm.errors import EdgeLMError, ModelFileError, UnsupportedModel
from edgelm.files.gguf import open_model
from edgelm.testing.tiny_folder import write_tokenizer
from edgelm.testing.tiny_vocab import gpt2_vocab, llama_vocab
from edgelm.text.build import build_tables
from edgelm.text.hugging_face import gguf_metadata
from edgelm.text.tables import Tables
from edgelm.text.tokenizer import Tokenizer

PRE = ("smollm", "qwen2", "gpt-2", "llama-bpe")


def tokenizers(folder: Path) -> tuple[Theirs, Tokenizer]:
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    metadata = gguf_metadata(folder / "tokenizer.json", content, config, [], 0)
    return Theirs.from_file(str(folder / "tokenizer.json")), in_memory(metadata)


def in_memory(metadata: dict[str, Any]) -> Tokenizer:
    return Tokenizer(Tables(b"".join(build_tables(as_header(metadata).metadata))))


def edit(folder: Path, **changes: Any) -> None:
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    (folder / "tokenizer.json").write_text(json.dumps(content | changes), encoding="utf-8")


def assert_same_ids(folder: Path, n_texts: int, seed: int) -> None:
    theirs, ours = tokenizers(folder)
    rng = random.Random(seed)
    for _ in range(n_texts):
        text = sample(rng)
        assert ours.encode(text, parse_special=True) == theirs.encode(text).ids, repr(text)


@pytest.mark.parametrize("pre", PRE)
def test_ids_are_those_of_the_library(pre: str, tmp_path: Path) -> None:
    write_tokenizer(tmp_path, pair_vocabulary(pre))
    assert_same_ids(tmp_path, 200, seed=1)


@pytest.mark.parametrize("prefix", ["prepend", "first", "always", "never"])
def test_ids_of_characters_are_those_of_the_library(prefix: str, tmp_path: Path) -> None:
    write_tokenizer(tmp_path, llama_vocab())
    if prefix != "prepend":
        space = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": prefix, "split": False}
        edit(tmp_path, normalizer=None, pre_tokenizer=space)
    assert_same_ids(tmp_path, 200, seed=2)


@pytest.mark.models
@pytest.mark.parametrize("name", ["SmolLM2", pytest.param("gemma-3-270m", marks=pytest.mark.slow)])
def test_ids_of_real_vocabularies_are_those_of_the_library(name: str, tmp_path: Path) -> None:
    write_tokenizer(tmp_path, open_model(real_path(name)).metadata)
    assert_same_ids(tmp_path, 400, seed=3)


REFUSED: dict[str, tuple[bool, dict[str, Any], type[EdgeLMError], str]] = {
    "unigram": (False, {"model": {"type": "Unigram", "vocab": []}}, UnsupportedModel, "a model of type 'Unigram'"),
    "another normalizer": (True, {"normalizer": {"type": "Lowercase"}}, UnsupportedModel, "normalizer 'Lowercase'"),
    "another splitter": (
        True,
        {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "Whitespace"}, {"type": "ByteLevel"}]}},
        UnsupportedModel,
        "the pre-tokenizer 'Whitespace'",
    ),
    "another expression": (
        True,
        {
            "pre_tokenizer": {
                "type": "Sequence",
                "pretokenizers": [
                    {"type": "Split", "pattern": {"Regex": r"\w+"}, "behavior": "Isolated", "invert": False},
                    {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
                ],
            }
        },
        UnsupportedModel,
        "the way of cutting text into words",
    ),
    "split Metaspace": (
        False,
        {"pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}},
        UnsupportedModel,
        "the pre-tokenizer 'Metaspace'",
    ),
    "plain spaces": (False, {"normalizer": None}, UnsupportedModel, "with plain spaces"),
    "a space before": (
        True,
        {"added_tokens": [{"id": 0, "content": "<mask>", "lstrip": True, "special": True}]},
        UnsupportedModel,
        "takes the space before it",
    ),
    "no model": (True, {"model": None}, ModelFileError, "makes no sense"),
    "endless ids": (
        True,
        {"added_tokens": [{"id": 2**40, "content": "<far>", "special": True}]},
        ModelFileError,
        "makes no sense",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_supported_is_named(name: str, tmp_path: Path) -> None:
    byte_level, changes, kind, fact = REFUSED[name]
    write_tokenizer(tmp_path, gpt2_vocab("qwen2") if byte_level else llama_vocab())
    edit(tmp_path, **changes)
    content = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    with pytest.raises(EdgeLMError) as caught:
        gguf_metadata(tmp_path / "tokenizer.json", content, {}, [], 0)
    assert type(caught.value) is kind
    assert fact in str(caught.value)


def test_tokens_after_which_space_goes(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, llama_vocab())
    content = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    for added in content["added_tokens"]:
        added["rstrip"] = added["content"] == "<|im_end|>"
    edit(tmp_path, added_tokens=content["added_tokens"])
    theirs, ours = tokenizers(tmp_path)
    for text in ("a<|im_end|> \n b", "a<|im_start|> \n b"):
        assert ours.encode(text, parse_special=True) == theirs.encode(text).ids


def test_texts_come_back_as_the_library_gives_them(tmp_path: Path) -> None:
    for name, metadata in (("bytes", gpt2_vocab("qwen2")), ("characters", llama_vocab())):
        (tmp_path / name).mkdir()
        write_tokenizer(tmp_path / name, metadata)
        theirs, ours = tokenizers(tmp_path / name)
        for text in ("the other", " and in", "été 漢字 😀", "a\n\nb"):
            ids = theirs.encode(text).ids
            assert ours.decode(ids) == theirs.decode(ids) == text
