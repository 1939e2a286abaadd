"""From text without special tokens to ids: GPT-2's byte alphabet, raw UTF-8 pairs, and merges by score.

Each encoder does what libllama's of the same kind does. Knows tables and words; knows no special tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Protocol

import numpy as np

from edgelm.text.merge import merge_pairs
from edgelm.text.pretokenize import WHOLE, PreTokenizer
from edgelm.text.tables import Tables, bigram_bit
from edgelm.text.unicode_classes import code_points

SPACE = "\u2581"
_MAX_CACHED, _MAX_CACHED_CHARS = 4096, 48
_MAX_PAIRS = 16384
_STEP = 1 << 16  # code points looked at together


class Encoder(Protocol):
    """Turns text into ids and a token's text into bytes."""

    def encode(self, text: str, after_special: bool) -> Iterator[int]: ...
    def piece(self, text: bytes) -> bytes: ...


class WordCache:
    """Remembers the ids of words; bounded, and forgets everything at once when full."""

    def __init__(self, encode: Callable[[str], tuple[int, ...]]) -> None:
        self._encode, self._known = encode, dict[str, tuple[int, ...]]()

    def __call__(self, word: str) -> tuple[int, ...]:
        ids = self._known.get(word)
        if ids is None:
            ids = self._encode(word)
            if len(word) <= _MAX_CACHED_CHARS:
                if len(self._known) >= _MAX_CACHED:
                    self._known.clear()
                self._known[word] = ids
        return ids


@functools.cache
def byte_alphabet() -> dict[int, str]:
    """Return GPT-2's character for each byte: printable Latin-1 stands for itself, the rest for U+0100 and up."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(others)}


@functools.cache
def _alphabet_bytes() -> dict[str, bytes]:
    return {char: bytes((byte,)) for byte, char in byte_alphabet().items()}


class ByteLevelEncoder:
    """Byte-pair encoding over the bytes of words."""

    def __init__(self, tables: Tables, pre: PreTokenizer) -> None:
        self._tables, self._pre = tables, pre
        self._symbols = [tables.find(char.encode()) for _, char in sorted(byte_alphabet().items())]
        self._word = WordCache(self._encode_word)

    def encode(self, text: str, after_special: bool) -> Iterator[int]:
        for word in self._pre.words(text):
            yield from self._word(word)

    def _encode_word(self, word: str) -> tuple[int, ...]:
        raw, tables = word.encode(), self._tables
        if self._pre.ignore_merges:
            whole = tables.find_token(raw.decode("latin-1").translate(byte_alphabet()).encode())
            if whole >= 0:
                return (whole,)
        merged = merge_pairs([self._symbols[byte] for byte in raw], tables.pair)
        n_tokens = tables.n_tokens
        if all(0 <= symbol < n_tokens for symbol in merged):
            return tuple(merged)
        ids = [symbol for symbol in merged if symbol >= 0]
        return tuple(token for symbol in ids for token in self._spell(symbol))

    def _spell(self, symbol: int) -> list[int]:
        """Return a symbol that is no token as the single-byte tokens that there are."""
        if symbol < self._tables.n_tokens:
            return [symbol]
        found = (self._tables.find_token(bytes((byte,))) for byte in self._tables.text(symbol))
        return [token for token in found if token >= 0]

    def piece(self, text: bytes) -> bytes:
        known = _alphabet_bytes()
        return b"".join(known.get(char) or char.encode() for char in text.decode("utf-8", "replace"))


class _Segments:
    """Cuts text where no token has the two neighbouring characters side by side: no merge can cross there."""

    def __init__(self, tables: Tables) -> None:
        self._bits = np.frombuffer(tables.section("bigrams"), dtype=np.uint8)

    def cut(self, text: str) -> Iterator[str]:
        start = 0
        points = code_points(text)
        for first in range(0, len(points), _STEP):
            window = points[first : first + _STEP + 1].astype(np.uint64)
            bit = bigram_bit(window[:-1], window[1:])
            joined = self._bits[bit >> np.uint64(3)] >> (bit & np.uint64(7)).astype(np.uint8) & 1
            for end in (np.flatnonzero(joined == 0) + (first + 1)).tolist():
                yield text[start:end]
                start = end
        if start < len(text):
            yield text[start:]


class _Characters:
    """Ids for the characters of a segment; those that are no token get ids beyond the tables for the while."""

    def __init__(self, tables: Tables, segment: str) -> None:
        self._tables = tables
        self._first_unknown = len(tables.offsets) - 1
        self._unknown: list[bytes] = []
        known: dict[str, int] = {}
        self.symbols = [known[c] if c in known else known.setdefault(c, self._id_of(c.encode())) for c in segment]

    def _id_of(self, char: bytes) -> int:
        found = self._tables.find(char)
        if found < 0:
            found = self._first_unknown + len(self._unknown)
            self._unknown.append(char)
        return found

    def text(self, symbol: int) -> bytes:
        beyond = symbol - self._first_unknown
        return self._tables.text(symbol) if beyond < 0 else self._unknown[beyond]


class RawPairEncoder:
    """Byte-pair encoding over characters, with bytes spelled `<0xXX>`: over whole lines (Gemma 4), or over all text."""

    def __init__(self, tables: Tables, pre: PreTokenizer) -> None:
        self._tables, self._pre = tables, pre
        self._newlines_whole = pre.name not in ("sarvam-moe", WHOLE.name)
        self._prefix: str = tables.meta.get("space_prefix", "")
        self._segments = _Segments(tables)
        self._segment = WordCache(self._encode_segment)

    def encode(self, text: str, after_special: bool) -> Iterator[int]:
        text = text.replace(" ", SPACE)
        if after_special and self._prefix and (self._prefix == "prepend" or not text.startswith(SPACE)):
            text = SPACE + text
        for line in self._pre.words(text):
            if self._newlines_whole and line[0] == "\n" and (whole := self._tables.find_token(line.encode())) >= 0:
                yield whole
                continue
            for segment in self._segments.cut(line):
                yield from self._segment(segment)

    def _encode_segment(self, segment: str) -> tuple[int, ...]:
        characters = _Characters(self._tables, segment)
        ids: list[int] = []
        for symbol in merge_pairs(characters.symbols, self._tables.pair):
            if symbol < self._tables.n_tokens:
                ids.append(symbol)
            else:
                found = (self._tables.find_token(b"<0x%02X>" % byte) for byte in characters.text(symbol))
                ids += [token for token in found if token >= 0]
        return tuple(ids)

    def piece(self, text: bytes) -> bytes:
        return text.replace(SPACE.encode(), b" ")


class ScoreEncoder:
    """SentencePiece's byte-pair encoding: of two neighbours whose texts join to a token, the best score first."""

    def __init__(self, tables: Tables) -> None:
        self._tables, self._ranks = tables, tables.section("ranks")
        self._space_prefix: bool = tables.meta["add_space_prefix"]
        self._unknown: int = tables.meta["ids"].get("unk", -1)
        self._segments = _Segments(tables)
        self._segment = WordCache(self._encode_segment)
        self._pairs: dict[int, int] = {}

    def encode(self, text: str, after_special: bool) -> Iterator[int]:
        if self._space_prefix and after_special:
            text = " " + text
        for segment in self._segments.cut(text.replace(" ", SPACE)):
            yield from self._segment(segment)

    def _encode_segment(self, segment: str) -> tuple[int, ...]:
        characters, tables, ranks = _Characters(self._tables, segment), self._tables, self._ranks
        pairs, n_tokens = self._pairs, self._tables.n_tokens
        if len(pairs) > _MAX_PAIRS:
            pairs.clear()

        def pair(left: int, right: int) -> int:
            key = left << 32 | right
            found = pairs.get(key)
            if found is None:
                token = tables.find(characters.text(left) + characters.text(right))
                found = ranks[token] << 32 | token if token >= 0 else -1
                if left < n_tokens and right < n_tokens:
                    pairs[key] = found
            return found

        ids: list[int] = []
        for symbol in merge_pairs(characters.symbols, pair):
            if symbol < n_tokens:
                ids.append(symbol)
            else:
                ids += [self._byte(byte) for byte in characters.text(symbol)]
        return tuple(token for token in ids if token >= 0)

    def _byte(self, byte: int) -> int:
        for text in (b"<0x%02X>" % byte, bytes((byte,))):
            if (token := self._tables.find_token(text)) >= 0:
                return token
        return self._unknown

    def piece(self, text: bytes) -> bytes:
        return text.replace(SPACE.encode(), b" ")
