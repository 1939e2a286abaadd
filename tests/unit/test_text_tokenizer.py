"""Tokenizers: the ids of libllama, text back from ids, and the files that hold the tables."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from text_samples import Header, as_header, pair_vocabulary, real_path, sample

from edgelm.errors import UnsupportedModel
from edgelm.files import open_model
from edgelm.testing import write_gguf
from edgelm.testing.tiny_vocab import gpt2_vocab, llama_vocab
from edgelm.text import cache
from edgelm.text.build import build_tables
from edgelm.text.pretokenize import KNOWN_PRE_TOKENIZERS
from edgelm.text.tables import Tables
from edgelm.text.tokenizer import Tokenizer, load_tokenizer

REAL = ("SmolLM2-135M-Instruct", "gemma-3-270m")
COMMON_PRE = ("smollm", "qwen2", "llama-bpe", "gpt-2", "default", "tekken", "gpt-4o", "gemma4")


def in_memory(metadata: dict[str, Any]) -> Tokenizer:
    return Tokenizer(Tables(b"".join(build_tables(as_header(metadata).metadata))))


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def tiny(request: pytest.FixtureRequest) -> Tokenizer:
    return in_memory(gpt2_vocab("gpt-2") if request.param == "gpt2" else llama_vocab())


def libllama(path: Path) -> Any:
    llama_cpp = pytest.importorskip("llama_cpp")
    return llama_cpp.Llama(str(path), vocab_only=True, verbose=False)


def assert_same_ids(path: Path, folder: Path, n_texts: int, seed: int) -> None:
    theirs, ours = libllama(path), load_tokenizer(open_model(path), cache_dir=folder)
    rng = random.Random(seed)
    for _ in range(n_texts):
        text, special, add_bos = sample(rng), rng.random() < 0.5, rng.random() < 0.5
        expected = theirs.tokenize(text.encode(), add_bos=add_bos, special=special)
        assert ours.encode(text, parse_special=special, add_bos=None if add_bos else False) == expected, repr(text)


@pytest.mark.models
@pytest.mark.parametrize("name", REAL)
def test_ids_equal_libllama_on_real_vocabularies(name: str, tmp_path: Path) -> None:
    assert_same_ids(real_path(name), tmp_path, 250, seed=1)


@pytest.mark.models
@pytest.mark.parametrize("name", REAL)
def test_ends_and_pieces_equal_libllama(name: str, tmp_path: Path) -> None:
    import ctypes

    path = real_path(name)
    theirs, ours = libllama(path), load_tokenizer(open_model(path), cache_dir=tmp_path)
    import llama_cpp

    vocab, buffer = llama_cpp.llama_model_get_vocab(theirs._model.model), ctypes.create_string_buffer(512)
    candidates = {*ours.special_tokens.values(), *range(0, ours.n_vocab, 37)}
    assert ours.eos_ids == {token for token in candidates if llama_cpp.llama_vocab_is_eog(vocab, token)}
    for token in range(0, ours.n_vocab, 37):
        n_bytes = llama_cpp.llama_token_to_piece(vocab, token, buffer, 512, 0, True)
        assert ours.token_bytes(token) == buffer.raw[:n_bytes]


@pytest.mark.parametrize("pre", COMMON_PRE)
def test_ids_equal_libllama_for_common_pre_tokenizers(pre: str, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "v.gguf", pair_vocabulary(pre), [])
    assert_same_ids(path, tmp_path, 80, seed=2)


@pytest.mark.slow
@pytest.mark.parametrize("pre", KNOWN_PRE_TOKENIZERS)
def test_ids_equal_libllama_for_every_pre_tokenizer(pre: str, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "v.gguf", pair_vocabulary(pre), [])
    assert_same_ids(path, tmp_path, 500, seed=4)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_ids_equal_libllama_on_tiny_vocabularies(kind: str, tmp_path: Path) -> None:
    metadata = gpt2_vocab("qwen2") if kind == "gpt2" else llama_vocab()
    path = write_gguf(tmp_path / "v.gguf", {"general.architecture": "llama", **metadata}, [])
    assert_same_ids(path, tmp_path, 300, seed=3)


def test_ids_equal_the_tokenizers_package() -> None:
    tokenizers = pytest.importorskip("tokenizers")
    metadata = gpt2_vocab("gpt-2")
    n_plain = 256 + len(metadata["tokenizer.ggml.merges"])
    vocab = {text: token for token, text in enumerate(metadata["tokenizer.ggml.tokens"][:n_plain])}
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    oracle = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=merges))
    oracle.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    ours = in_memory(metadata)
    for text in ("", "the other  and\n\n", "in the winter, of 1212 re-entering's", "été ﬀ 漢字 😀 \t x"):
        assert ours.encode(text) == oracle.encode(text).ids


@given(text=st.text())
@settings(max_examples=150, deadline=None)
def test_text_comes_back(tiny: Tokenizer, text: str) -> None:
    # To SentencePiece U+2581 is a space.
    assert tiny.decode(tiny.encode(text)).replace("▁", " ") == text.replace("▁", " ")


@given(ids=st.lists(st.integers(0, 300)))
@settings(max_examples=150, deadline=None)
def test_incremental_text_is_the_text_and_never_half_a_character(tiny: Tokenizer, ids: list[int]) -> None:
    decoder = tiny.incremental()
    pieces = [decoder.feed(token) for token in ids] + [decoder.flush()]
    shown = b"".join(tiny.token_bytes(token) for token in ids if not tiny.is_special(token))
    assert "".join(pieces) == shown.decode("utf-8", "replace")
    assert decoder.flush() == ""


def test_a_character_in_pieces_waits_for_its_last_byte() -> None:
    tokenizer = in_memory(gpt2_vocab("gpt-2"))
    decoder = tokenizer.incremental()
    assert [decoder.feed(token) for token in tokenizer.encode("😀")] == ["", "", "", "😀"]
    half = tokenizer.encode("😀")[:2]
    assert [decoder.feed(token) for token in half] + [decoder.flush()] == ["", "", "\ufffd"]


def test_surrogates_become_characters_or_the_replacement_character(tiny: Tokenizer) -> None:
    assert tiny.encode("\ud83d\ude00") == tiny.encode("😀")
    assert tiny.encode("a\ud83d b") == tiny.encode("a\ufffd b")


def test_special_tokens_are_parsed_on_demand_only() -> None:
    tokenizer = in_memory(gpt2_vocab("gpt-2"))
    end = tokenizer.special_tokens["<|im_end|>"]
    assert tokenizer.encode("a<|im_end|>", parse_special=True)[-1] == end
    assert end not in tokenizer.encode("a<|im_end|>")
    assert tokenizer.is_special(end)
    assert end in tokenizer.eos_ids
    assert tokenizer.decode([end]) == ""
    assert tokenizer.decode([end], special=True) == "<|im_end|>"


def test_ids_beyond_the_vocabulary_have_no_text(tiny: Tokenizer) -> None:
    assert tiny.token_bytes(tiny.n_vocab) == b""
    assert tiny.token_bytes(-1) == b""


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokenizer.ggml.model": "t5"}, "kind 't5'"),
        ({"tokenizer.ggml.pre": "nobody"}, "pre-tokenizer 'nobody'"),
        ({"tokenizer.ggml.tokens": None}, "no vocabulary"),
        ({"tokenizer.ggml.merges": None}, "no merges"),
    ],
)
def test_what_is_not_supported_is_said(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedModel, match=message):
        in_memory(gpt2_vocab("gpt-2") | change)


def test_time_is_not_quadratic(tiny: Tokenizer) -> None:
    for text in ("a" * 50_000, "in the winter of " * 3000, "漢" * 20_000):
        began = time.perf_counter()
        tiny.encode(text)
        assert time.perf_counter() - began < 5


def test_tables_are_built_once_and_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    header = as_header(gpt2_vocab("gpt-2"))
    first = load_tokenizer(header, cache_dir=tmp_path)
    assert len(list(tmp_path.iterdir())) == 1
    monkeypatch.setattr("edgelm.text.build.build_tables", lambda _: pytest.fail("built twice"))
    assert load_tokenizer(header, cache_dir=tmp_path).encode("the end") == first.encode("the end")


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "garbage"])
def test_a_damaged_table_file_is_built_again(tmp_path: Path, damage: str) -> None:
    header = as_header(llama_vocab())
    expected = load_tokenizer(header, cache_dir=tmp_path).encode("the winter")
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    middle = len(whole) // 2
    path.write_bytes(
        {
            "cut": whole[:middle],
            "flip": whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :],
            "empty": b"",
            "garbage": b"edgelmTK" + b"\xff" * 100,
        }[damage]
    )
    assert load_tokenizer(header, cache_dir=tmp_path).encode("the winter") == expected
    assert path.read_bytes() == whole


def test_a_folder_that_cannot_be_written_costs_only_speed(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    tokenizer = load_tokenizer(as_header(gpt2_vocab("gpt-2")), cache_dir=blocked / "tokenizers")
    assert tokenizer.decode(tokenizer.encode("the end")) == "the end"


def test_the_cache_folder_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGELM_CACHE", str(tmp_path))
    assert cache.default_folder() == tmp_path / "tokenizers"
    monkeypatch.delenv("EDGELM_CACHE")
    assert cache.default_folder().parts[-2:] == ("edgelm", "tokenizers")


def test_a_large_vocabulary_builds_fast_and_adds_little_memory(tmp_path: Path) -> None:
    script = """
import sys, time
sys.path.insert(0, sys.argv[2])
from pathlib import Path
from text_samples import as_header, pair_vocabulary
from edgelm.text.tokenizer import load_tokenizer
def rss():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmRSS")) * 1024
header = as_header(pair_vocabulary("qwen2"))
load_tokenizer(header, cache_dir=Path(sys.argv[1]))
before, began = rss(), time.perf_counter()
tokenizer = load_tokenizer(header, cache_dir=Path(sys.argv[1]))
seconds = time.perf_counter() - began
tokenizer.encode("The quick brown fox jumps over the lazy dog. " * 20)
print(seconds, rss() - before)
"""
    if not Path("/proc/self/status").exists():
        pytest.skip("no /proc to measure with")
    arguments = [sys.executable, "-c", script, str(tmp_path), str(Path(__file__).parent)]
    done = subprocess.run(arguments, capture_output=True, text=True, check=True, env=os.environ)
    seconds, n_bytes = map(float, done.stdout.split())
    assert seconds < 0.2
    assert n_bytes < 8_000_000


def test_of_equal_texts_the_last_counts() -> None:
    metadata = gpt2_vocab("gpt-2")
    metadata["tokenizer.ggml.tokens"] = [*metadata["tokenizer.ggml.tokens"], "Ġthe"]
    del metadata["tokenizer.ggml.token_type"]
    tokenizer = in_memory(metadata)
    assert tokenizer.find("Ġthe") == tokenizer.n_vocab - 1


def test_header_needs_only_metadata_and_fingerprint(tmp_path: Path) -> None:
    assert load_tokenizer(Header(as_header(llama_vocab()).metadata), cache_dir=tmp_path).n_vocab > 256
