"""A vocabulary as flat tables in one buffer: look up texts, ids and merges without a Python object per token.

The same bytes serve in memory and mapped from a file. Knows the layout; knows neither GGUF nor algorithms.
"""

from __future__ import annotations

import json
import mmap
import struct
import zlib
from collections.abc import Iterable, Mapping
from typing import Any

MAGIC = b"edgelmTK"
FORMAT = 1
_HEAD = struct.Struct("<8sIIQ")  # magic, CRC-32 of everything after the head, bytes of JSON, bytes in all
_ALIGNMENT = 64

# What a token is, as bits: those of llama_token_attr, except that the last one has moved into the byte.
UNKNOWN, UNUSED, NORMAL, CONTROL, USER_DEFINED, BYTE = 1, 2, 4, 8, 16, 32
STRIP_RIGHT = 128


class BadTables(Exception):
    """The bytes are not tables of this format, or not all of them."""


def pack(meta: Mapping[str, Any], sections: Mapping[str, tuple[str, bytes | bytearray | memoryview]]) -> list[bytes]:
    """Return the chunks of a file that holds `meta` (JSON values) and `sections` (`name -> (typecode, bytes)`)."""
    layout, at = {}, 0
    for name, (typecode, data) in sections.items():
        layout[name] = (typecode, at, len(data))
        at += -(-len(data) // _ALIGNMENT) * _ALIGNMENT
    header = json.dumps({"format": FORMAT, "meta": meta, "layout": layout}, separators=(",", ":")).encode()
    header += b" " * (-(_HEAD.size + len(header)) % _ALIGNMENT)
    chunks = [header]
    for _, data in sections.values():
        chunks += [bytes(data), bytes(-len(data) % _ALIGNMENT)]
    n_bytes = _HEAD.size + sum(map(len, chunks))
    return [_HEAD.pack(MAGIC, crc32_of(chunks), len(header), n_bytes), *chunks]


def crc32_of(chunks: Iterable[bytes | memoryview]) -> int:
    """Return the CRC-32 of all chunks in a row."""
    crc = 0
    for chunk in chunks:
        crc = zlib.crc32(chunk, crc)
    return crc


def checked_head(head: bytes, n_bytes: int) -> int:
    """Return the CRC-32 that the rest of a file of `n_bytes` must have; raise `BadTables` for a wrong head."""
    if len(head) < _HEAD.size:
        raise BadTables("too short")
    magic, crc, _, promised = _HEAD.unpack_from(head)
    if magic != MAGIC or promised != n_bytes:
        raise BadTables("not tables, or truncated")
    return int(crc)


HEAD_BYTES = _HEAD.size


class Tables:
    """The tables of one vocabulary; tokens are followed by the strings that only merges know.

    `meta` is what was packed. Ids at or above `n_tokens` are such strings: they take part in merges and are no tokens.
    """

    def __init__(self, buffer: bytes | mmap.mmap) -> None:
        self._buffer = buffer
        _, _, n_header, _ = _HEAD.unpack_from(buffer)
        try:
            header = json.loads(buffer[_HEAD.size : _HEAD.size + n_header])
        except ValueError as error:
            raise BadTables("no header") from error
        if header.get("format") != FORMAT:
            raise BadTables("another format")
        self.meta: dict[str, Any] = header["meta"]
        self._base = _HEAD.size + n_header
        self._layout: dict[str, tuple[str, int, int]] = header["layout"]
        self._text_at = self._base + self._layout["text"][1]
        self.offsets, self.attrs = self.section("offsets"), self.section("attrs")
        self._starts, self._ids = self.section("starts"), self.section("ids")
        self._mask = len(self._starts) - 2
        self.n_tokens = len(self.attrs)
        if "pair_keys" in self._layout:
            self._pair_starts = self.section("pair_starts")
            self._pair_keys, self._pair_values = self.section("pair_keys"), self.section("pair_values")
            self._pair_mask = len(self._pair_starts) - 2

    def section(self, name: str) -> memoryview:
        """Return a section as a view of its items; `KeyError` if this kind of vocabulary has none."""
        typecode, at, n_bytes = self._layout[name]
        view = memoryview(self._buffer)[self._base + at : self._base + at + n_bytes]
        return view.cast("Q" if typecode == "Q" else "I" if typecode == "I" else "B")

    def text(self, token: int) -> bytes:
        """Return the text of a token as the file spells it."""
        at, offsets = self._text_at, self.offsets
        return self._buffer[at + offsets[token] : at + offsets[token + 1]]

    def find(self, text: bytes) -> int:
        """Return the id of the token or merge string that reads `text`, or -1. Of duplicates, the last."""
        bucket = zlib.crc32(text) & self._mask
        starts, ids, offsets, at, buffer = self._starts, self._ids, self.offsets, self._text_at, self._buffer
        for index in range(starts[bucket], starts[bucket + 1]):
            token = ids[index]
            if buffer[at + offsets[token] : at + offsets[token + 1]] == text:
                return int(token)
        return -1

    def find_token(self, text: bytes) -> int:
        """Return the id of the token that reads `text`, or -1."""
        found = self.find(text)
        return found if found < self.n_tokens else -1

    def pair(self, left: int, right: int) -> int:
        """Return `rank << 32 | result` for two neighbours that merge, or -1."""
        bucket = pair_bucket(left, right) & self._pair_mask
        starts, keys, key = self._pair_starts, self._pair_keys, left << 32 | right
        for index in range(starts[bucket], starts[bucket + 1]):
            if keys[index] == key:
                return int(self._pair_values[index])
        return -1


def pair_bucket(left: Any, right: Any) -> Any:
    """Hash two ids; works on ints and on uint64 arrays alike."""
    return (left * 0x9E3779B1 ^ right * 0x85EBCA6B) >> 9


def bigram_bit(left: Any, right: Any) -> Any:
    """Hash two code points to a bit of the bigram table; works on ints and on uint64 arrays alike."""
    return (left * 0x9E3779B1 ^ right * 0x85EBCA6B) >> 7 & BIGRAM_BITS - 1


BIGRAM_BITS = 1 << 21
