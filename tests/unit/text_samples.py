"""Texts and vocabularies that tell pre-tokenizers apart; shared by the tests of edgelm.text."""

from __future__ import annotations

import os
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgelm.files import StringArray
from edgelm.text.encoders import byte_alphabet

POOLS = (
    "abcdefghij KLMNOP'sSdDlLtT revemd", "0123456789 ٣६Ⅷ²½", "  \t\n\r\v\f\x85\xa0\u2003\u3000\u200b\u2028",
    " .,!?-_/\\()[]{}<>|@#$%^&*+=~`\"':;", "éüñÀßſKİıçñ", "中文字符漢語日本語ひらがなカタカナ한국어",
    "ااعربي।हिन्दीไทยབོད",
    "😀👨‍👩‍👧🏽❤️🇫🇷", "\u0301\u0300\u0902\u20d0\u0e31", "𐍈𝒜𝟙🄀𠀀", "\x00\x01\x1b\x7f\ufffe\ufeff",
)  # fmt: skip
WORDS = (
    "Hello", "world", "don't", "I'LL", "def", "return", "  ", "    ", "\n", "\n\n", "\r\n", "1234567", "3.14",
    "<|im_start|>", "<|im_end|>", "<end_of_turn>", "<start_of_turn>", "<bos>", "<eos>", "<unused7>", "<h1>", "</table>",
    "<|endoftext|>", "<|im_", "start|>", "<0x0A>", "▁", "▁▁", "<", "|>", "naïve", "café", "x", "=", " ", " a", "user",
)  # fmt: skip


def sample(rng: random.Random) -> str:
    """Return a random text: of one script, of many, of any code points, or of words and special tokens."""
    n_chars = rng.choice((1, 2, 3, 5, 10, 40, 150))
    kind = rng.randrange(5)
    if kind == 0:
        return "".join(rng.choice(rng.choice(POOLS)) for _ in range(n_chars))
    if kind == 1:
        pool = rng.choice(POOLS)
        return "".join(rng.choice(pool) for _ in range(n_chars))
    if kind == 2:
        points = (rng.randrange(rng.choice((0x300, 0x10000, 0x110000))) for _ in range(n_chars))
        return "".join(chr(point) for point in points if not 0xD800 <= point < 0xE000)
    return "".join(rng.choice(WORDS) for _ in range(n_chars))


def pair_vocabulary(pre: str) -> dict[str, Any]:
    """Return a vocabulary in which any two common bytes merge, so that every cut between words shows in the ids."""
    rng = random.Random(1)
    alphabet = byte_alphabet()
    letters = [*alphabet.values(), "▁"]
    merging = [alphabet[byte] for byte in (*b"\t\n\r", *range(0x20, 0x7F), *"é中٣\u0301\u3000".encode())] + ["▁"]
    pairs = [(left, right) for left in dict.fromkeys(merging) for right in dict.fromkeys(merging)]
    rng.shuffle(pairs)
    triples = [(left + right, rng.choice(merging)) for left, right in pairs[:2000]]
    tokens = [*letters, *(f"<0x{byte:02X}>" for byte in range(256)), *(a + b for a, b in pairs + triples)]
    special = ["<|im_start|>", "<|im_end|>", "\n\n"]
    return {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": StringArray.of(tokens + special),
        "tokenizer.ggml.merges": StringArray.of([f"{left} {right}" for left, right in pairs + triples]),
        "tokenizer.ggml.token_type": np.array([1] * len(tokens) + [3, 3, 4], dtype=np.int32),
        "tokenizer.ggml.bos_token_id": len(tokens),
        "tokenizer.ggml.eos_token_id": len(tokens) + 1,
    }


@dataclass(frozen=True)
class Header:
    """Metadata without a file."""

    metadata: dict[str, Any]
    fingerprint: str = field(default="0f" * 16)
    pack: None = None


def as_header(metadata: dict[str, Any]) -> Header:
    """Return metadata as an opened model gives it, with lists of strings as string arrays."""
    converted = {
        key: StringArray.of(value) if isinstance(value, list) and value and isinstance(value[0], str) else value
        for key, value in metadata.items()
    }
    return Header({key: np.array(value) if isinstance(value, list) else value for key, value in converted.items()})


def real_path(name: str) -> Path:
    """Return the path of a real model, or skip the test."""
    folder = os.environ.get("EDGELM_TEST_MODELS")
    found = sorted(Path(folder).glob(f"{name}*.gguf")) if folder else []
    if not found:
        pytest.skip(f"no {name}*.gguf: set EDGELM_TEST_MODELS to a folder that has one")
    return found[0]
