"""Turn the tokenizer part of a GGUF header into flat tables.

Memory beyond the tables stays small: strings pass one by one. Knows metadata keys; runs no tokenizer.
"""

from __future__ import annotations

import mmap
import zlib
from array import array
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from edgelm.errors import UnsupportedModel
from edgelm.text import special
from edgelm.text.hashing import Hashes, SubstringHashes
from edgelm.text.pretokenize import WHOLE, PreTokenizer, pre_tokenizer
from edgelm.text.tables import (
    BIGRAM_BITS,
    BYTE,
    CONTROL,
    NORMAL,
    STRIP_RIGHT,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    Tables,
    bigram_bit,
    pack,
    pair_bucket,
)

_ATTR_OF_TYPE = bytes((0, NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE))
_DEFAULT_IDS = {
    "llama": {"bos": 1, "eos": 2, "unk": 0},
    "gpt2": {"bos": 11, "eos": 11},
    "bert": {"bos": 101, "eos": 102, "unk": 100},
    "gemma4": {},
    "bpe": {},
}
_CHUNK = 8192


class Strings(Protocol):
    """What is asked of a string array in the metadata: string `i` is `data[offsets[i]:offsets[i + 1]]`."""

    @property
    def data(self) -> bytes | bytearray: ...
    @property
    def offsets(self) -> npt.NDArray[np.uint32]: ...
    def __len__(self) -> int: ...
    def iter_raw(self) -> Iterator[bytes]: ...


class PackedTables(Protocol):
    """What is asked of a pack: `edgelm.files.pack.Pack` is one."""

    @property
    def path(self) -> Path: ...
    def tokenizer_tables(self, fmt: int) -> bytes | mmap.mmap | None:
        """Return checked tables of this format, or None if it has others."""
        ...


class ModelHeader(Protocol):
    """What is asked of an opened model: `edgelm.files.ModelFile` is one."""

    @property
    def metadata(self) -> Mapping[str, Any]: ...
    @property
    def fingerprint(self) -> str: ...
    @property
    def pack(self) -> PackedTables | None: ...


def build_tables(metadata: Mapping[str, Any]) -> list[bytes]:
    """Return the chunks of the tables for the tokenizer in `metadata`.

    Raises `UnsupportedModel` for a kind of tokenizer, or a pre-tokenizer, that edgelm does not have.
    """
    kind = metadata.get("tokenizer.ggml.model", "none")
    if kind not in _DEFAULT_IDS or (kind == "bpe" and special.END_IDS not in metadata):
        raise UnsupportedModel(
            f"the file's tokenizer is of kind {kind!r} (known: gpt2, llama, gemma4, bert); use another model"
        )
    pre = (
        WHOLE
        if kind in ("bpe", "bert")
        else pre_tokenizer(kind if kind == "gemma4" else metadata.get("tokenizer.ggml.pre", ""))
    )
    strings: Strings | None = metadata.get("tokenizer.ggml.tokens")
    if strings is None or not len(strings):
        raise UnsupportedModel("the file holds no vocabulary (tokenizer.ggml.tokens); convert the model again")
    merged = kind not in ("llama", "bert")
    texts = _Texts()
    bigrams = _Bigrams() if pre.raw or kind == "llama" else None
    for token, text in enumerate(strings.iter_raw()):
        texts.append(text or b"[EMPTY_%d]" % token)
        if bigrams is not None:
            bigrams.add(text)
    attrs = bytearray(_attrs(metadata, len(strings)))
    meta = _meta(metadata, kind, pre, texts, attrs)
    sections: dict[str, tuple[str, Any]] = {"attrs": ("B", attrs)}
    if merged:
        sections |= _pairs(metadata, texts, bigrams)
    elif kind == "llama":
        sections["ranks"] = ("I", _ranks(metadata, len(strings)).tobytes())
    if bigrams is not None:
        sections["bigrams"] = ("B", bigrams.finish())
    return pack(meta, texts.sections() | sections)


def _attrs(metadata: Mapping[str, Any], n_tokens: int) -> bytes:
    types = metadata.get("tokenizer.ggml.token_type")
    if types is None:
        return bytes((NORMAL,)) * n_tokens
    if not isinstance(types, np.ndarray) or types.dtype.kind not in "iu" or len(types) < n_tokens:
        raise UnsupportedModel("tokenizer.ggml.token_type does not fit the vocabulary; convert the model again")
    known = np.where((types[:n_tokens] < 0) | (types[:n_tokens] >= len(_ATTR_OF_TYPE)), 0, types[:n_tokens])
    return np.frombuffer(_ATTR_OF_TYPE, dtype=np.uint8)[known].tobytes()


def _meta(metadata: Mapping[str, Any], kind: str, pre: PreTokenizer, texts: _Texts, attrs: bytearray) -> dict[str, Any]:
    from_json = special.END_IDS in metadata
    ids = special.special_ids(metadata, len(attrs), {} if from_json else _DEFAULT_IDS[kind])
    if kind == "bert":
        _settle_bert(metadata, ids, len(attrs))
    if pre.name in ("chatglm-bpe", "glm4", "glm5") and "tokenizer.ggml.bos_token_id" not in metadata:
        ids.pop("bos", None)
    lookup = texts.lookup()
    ends = special.settle(attrs, lookup.find, lookup.text, ids)
    kinds = np.frombuffer(bytes(attrs), dtype=np.uint8) & (CONTROL | USER_DEFINED | UNKNOWN)
    found = sorted(np.flatnonzero(kinds).tolist(), key=lambda token: -len(lookup.text(token)))
    name = str(metadata.get("general.name", "")).lower()
    if from_json:
        ends = sorted({*ends, *metadata[special.END_IDS].tolist()})
        for token in metadata[special.STRIP_RIGHT_IDS].tolist():
            attrs[token] |= STRIP_RIGHT
    elif "phi-3" in name or "phi3" in name:
        special.strip_right(attrs, found, lookup.find)
    spm, space_prefix = kind == "llama", metadata.get("tokenizer.edgelm.space_prefix", "")
    if kind == "bert":  # a text ends with what separates it from a second one
        lowercase = bool(metadata.get("tokenizer.ggml.normalizer.lowercase", True))
        return {
            "kind": kind,
            "ids": ids,
            "ends": ends,
            "special": found,
            "add_bos": True,  # whatever the file says, as in libllama
            "add_eos": True,
            "add_space_prefix": True,
            "lowercase": lowercase,
            "strip_accents": bool(metadata.get("tokenizer.ggml.normalizer.strip_accents", lowercase)),
        }
    add_bos = bool(metadata.get("tokenizer.ggml.add_bos_token", spm or pre.add_bos))
    return {
        "kind": kind,
        "pre": pre.name,
        "ids": ids,
        "ends": ends,
        "special": found,
        "add_bos": add_bos or pre.name in ("gemma4", "granite-embed-multi-311m"),
        "add_eos": bool(metadata.get("tokenizer.ggml.add_eos_token", False)),
        "add_space_prefix": bool(metadata.get("tokenizer.ggml.add_space_prefix", True)) if spm else bool(space_prefix),
        "space_prefix": space_prefix,
        "nfc": metadata.get("tokenizer.edgelm.nfc", False),
    }


def _settle_bert(metadata: Mapping[str, Any], ids: dict[str, int], n_tokens: int) -> None:
    """Let the separator take the place of the end of a text, and see that there is a token for unknown words."""
    separator = metadata.get("tokenizer.ggml.seperator_token_id", 102)  # spelled so in GGUF
    if not isinstance(separator, int) or not 0 <= separator < n_tokens or not {"bos", "unk"} <= ids.keys():
        raise UnsupportedModel(
            "the vocabulary lacks the tokens that begin and end a text or stand for unknown words; convert it again"
        )
    ids["eos"] = separator


class _Texts:
    """Token texts in a row, with their hashes."""

    def __init__(self) -> None:
        self._blob, self._offsets, self._hashes = bytearray(), array("I", [0]), array("I")

    def append(self, text: bytes) -> None:
        self._blob += text
        self._offsets.append(len(self._blob))
        self._hashes.append(zlib.crc32(text))

    def __len__(self) -> int:
        return len(self._hashes)

    def chunks(self) -> Iterator[tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64], npt.NDArray[np.int64]]]:
        """Yield the texts in turn, some thousand at a time: their bytes, and where in them each starts and ends."""
        for first in range(0, len(self), _CHUNK):
            bounds = np.array(self._offsets[first : first + _CHUNK + 1], dtype=np.int64)
            data = np.frombuffer(bytes(self._blob[bounds[0] : bounds[-1]]), dtype=np.uint8)
            yield data, bounds[:-1] - bounds[0], bounds[1:] - bounds[0]

    def sections(self) -> dict[str, tuple[str, Any]]:
        starts, order = _buckets(np.frombuffer(self._hashes, dtype=np.uint32))
        return {
            "text": ("B", self._blob),
            "offsets": ("I", self._offsets.tobytes()),
            "starts": ("I", starts.tobytes()),
            "ids": ("I", order.tobytes()),
        }

    def lookup(self) -> Tables:
        """Return tables that find the texts so far."""
        sections = self.sections() | {"attrs": ("B", bytes(len(self._hashes)))}
        return Tables(b"".join(pack({}, sections)))


def _buckets(hashes: npt.NDArray[Any]) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.uint32]]:
    """Group items by hash: bucket `b` has the items `order[starts[b]:starts[b + 1]]`, the last item first."""
    n_buckets = 1 << max(4, (len(hashes) - 1).bit_length())
    bucket = (hashes & np.uint64(n_buckets - 1)).astype(np.uint32)
    starts = np.zeros(n_buckets + 1, dtype=np.uint32)
    np.cumsum(np.bincount(bucket, minlength=n_buckets), out=starts[1:])
    order = len(hashes) - 1 - np.argsort(bucket[::-1], kind="stable")
    return starts, order.astype(np.uint32)


def _ranks(metadata: Mapping[str, Any], n_tokens: int) -> npt.NDArray[np.uint32]:
    """Return the rank of each token by score, 0 for the highest; equal scores have equal ranks."""
    scores = metadata.get("tokenizer.ggml.scores")
    if scores is None:
        return np.zeros(n_tokens, dtype=np.uint32)
    if not isinstance(scores, np.ndarray) or scores.dtype.kind not in "fi" or len(scores) < n_tokens:
        raise UnsupportedModel("tokenizer.ggml.scores does not fit the vocabulary; convert the model again")
    values, ranks = np.unique(scores[:n_tokens].astype(np.float32), return_inverse=True)
    return (len(values) - 1 - ranks).astype(np.uint32)


def _pairs(metadata: Mapping[str, Any], texts: _Texts, bigrams: _Bigrams | None) -> dict[str, tuple[str, Any]]:
    merges: Strings | None = metadata.get("tokenizer.ggml.merges")
    if merges is None:
        raise UnsupportedModel("the file holds no merges (tokenizer.ggml.merges); convert the model again")
    id_of = _IdsByHash(texts)
    keys, values = np.zeros(len(merges), dtype=np.uint64), np.zeros(len(merges), dtype=np.uint64)
    extra: dict[int, bytes] = {}  # strings that are no token, by their hash
    n_known, n_pairs = len(texts), 0
    for first in range(0, len(merges), _CHUNK):
        part = _MergeChunk(merges, first, min(first + _CHUNK, len(merges)))
        ids = [id_of(hashes) for hashes in part.hashes]
        for which in range(3):
            for at in np.flatnonzero(ids[which] < 0).tolist():
                extra.setdefault(int(part.hashes[which][at]), part.text(at, which))
        if extra:
            numbers = {text_hash: n_known + number for number, text_hash in enumerate(extra)}
            for which in range(3):
                for at in np.flatnonzero(ids[which] < 0).tolist():
                    ids[which][at] = numbers[int(part.hashes[which][at])]
        left, right, joined = (which.astype(np.uint64) for which in ids)
        done = slice(n_pairs, n_pairs + len(left))
        keys[done] = left << np.uint64(32) | right
        values[done] = part.ranks.astype(np.uint64) << np.uint64(32) | joined
        n_pairs += len(left)
    for text in extra.values():
        texts.append(text)
        if bigrams is not None:
            bigrams.add(text)
    return _pair_sections(keys[:n_pairs], values[:n_pairs])


class _MergeChunk:
    """The hashes of the left, right and joined texts of some merges; those without two texts are left out."""

    def __init__(self, merges: Strings, first: int, last: int) -> None:
        bounds = np.asarray(merges.offsets[first : last + 1], dtype=np.int64)
        self._data = bytes(memoryview(merges.data)[int(bounds[0]) : int(bounds[-1])])
        bounds = bounds - bounds[0]
        data = np.frombuffer(self._data, dtype=np.uint8)
        spaces = np.append(np.flatnonzero(data == 0x20), len(data))
        split = spaces[np.searchsorted(spaces, bounds[:-1] + 1).clip(max=len(spaces) - 1)]
        kept = np.flatnonzero(split < bounds[1:])
        self.ranks = kept + first
        self._starts, self._split, self._ends = bounds[:-1][kept], split[kept], bounds[1:][kept]
        hashed = SubstringHashes(data)
        left, right = hashed.of(self._starts, self._split), hashed.of(self._split + 1, self._ends)
        self.hashes = (left, right, hashed.joined(left, right, self._split - self._starts))

    def text(self, at: int, which: int) -> bytes:
        """Return the left (0), right (1) or joined (2) text of the merge `at`."""
        start, split, end = int(self._starts[at]), int(self._split[at]), int(self._ends[at])
        left, right = self._data[start:split], self._data[split + 1 : end]
        return (left, right, left + right)[which]


class _IdsByHash:
    """Finds tokens by the hashes of their texts; of equal texts, the last."""

    def __init__(self, texts: _Texts) -> None:
        hashes = np.concatenate([SubstringHashes(data).of(starts, ends) for data, starts, ends in texts.chunks()])
        self._order = np.argsort(hashes, kind="stable")
        self._hashes = hashes[self._order]

    def __call__(self, hashes: Hashes) -> npt.NDArray[np.int64]:
        at = np.searchsorted(self._hashes, hashes, side="right") - 1
        found = (at >= 0) & (self._hashes[at] == hashes)
        return np.where(found, self._order[at], -1)


def _pair_sections(keys: npt.NDArray[np.uint64], values: npt.NDArray[np.uint64]) -> dict[str, tuple[str, Any]]:
    keys, first = np.unique(keys, return_index=True)  # of a merge that stands twice, the first counts
    starts, order = _buckets(pair_bucket(keys >> np.uint64(32), keys & np.uint64(0xFFFFFFFF)))
    return {
        "pair_starts": ("I", starts.tobytes()),
        "pair_keys": ("Q", keys[order].tobytes()),
        "pair_values": ("Q", values[first][order].tobytes()),
    }


class _Bigrams:
    """A bit for each two characters that stand side by side in some token; a set bit may mean another two."""

    def __init__(self) -> None:
        self._bits = np.zeros(BIGRAM_BITS, dtype=np.bool_)
        self._pending: list[bytes] = []

    def add(self, text: bytes) -> None:
        self._pending.append(text)
        if len(self._pending) == _CHUNK:
            self._flush()

    def _flush(self) -> None:
        joined = b"\0".join(self._pending).decode("utf-8", "replace")
        points = np.frombuffer(joined.encode("utf-32-le"), dtype="<u4").astype(np.uint64)
        self._bits[bigram_bit(points[:-1], points[1:])] = True
        self._pending.clear()

    def finish(self) -> bytes:
        self._flush()
        return np.packbits(self._bits, bitorder="little").tobytes()
