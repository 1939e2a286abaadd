"""A folder's tokenizer.json in the terms of a GGUF header, so that the same tables are built of it.

Knows the byte-pair models of the tokenizers library and the parts around them that models here have; anything else is
refused by name. Reads no file and runs no tokenizer.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from edgelm.errors import ModelFileError, UnsupportedModel
from edgelm.text.special import END_IDS, STRIP_RIGHT_IDS

SPACE = "\u2581"
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)
_MAX_TOKENS = 2**21
_BYTE_TOKEN = re.compile("<0x[0-9A-F]{2}>")

_CONTRACTION = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SLASHED = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORD = r"[^\r\n\p{L}\p{N}]?"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_GPT2 = "bytes"  # the expression that ByteLevel has inside
_NAMES: dict[tuple[tuple[str, ...], bool], str] = {  # splits, ignore_merges -> tokenizer.ggml.pre
    ((_GPT2,), False): "gpt-2",
    (("digits", _GPT2), False): "smollm",
    ((rf"{_CONTRACTION}|{_WORD}\p{{L}}+|\p{{N}}{{1,3}}" + _REST,), False): "dbrx",
    ((rf"{_CONTRACTION}|{_WORD}\p{{L}}+|\p{{N}}{{1,3}}" + _REST,), True): "llama-bpe",
    ((rf"{_CONTRACTION}|{_WORD}\p{{L}}+|\p{{N}}" + _REST,), False): "qwen2",
    ((
        rf"{_WORD}{_UPPER}*{_LOWER}+{_CONTRACTION}?|{_WORD}{_UPPER}+{_LOWER}*{_CONTRACTION}?|\p{{N}}{{1,3}}" + _SLASHED,
    ), False): "gpt-4o",
    ((rf"{_WORD}{_UPPER}*{_LOWER}+|{_WORD}{_UPPER}+{_LOWER}*|\p{{N}}" + _SLASHED,), True): "tekken",
}  # fmt: skip


def gguf_metadata(
    path: object, tokenizer: Mapping[str, Any], config: Mapping[str, Any], ends: Sequence[int], n_vocab: int
) -> dict[str, Any]:
    """Return the keys of `tokenizer.ggml` for a tokenizer.json, strings as lists.

    `config` is tokenizer_config.json, `ends` the ids that end a generation, `n_vocab` the rows of the embedding.
    Raises `UnsupportedModel` for a tokenizer that edgelm does not have, `ModelFileError` for one that makes no sense.
    """
    try:
        return _Reader(path, tokenizer, config).metadata(ends, n_vocab)
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError, RecursionError) as error:
        raise ModelFileError(
            path, f"the tokenizer makes no sense ({type(error).__name__}: {str(error)[:80]})"
        ) from error


class _Reader:
    def __init__(self, path: object, tokenizer: Mapping[str, Any], config: Mapping[str, Any]) -> None:
        self._path, self._config = path, config
        self._model: Mapping[str, Any] = tokenizer["model"]
        self._added: Sequence[Mapping[str, Any]] = tokenizer.get("added_tokens") or []
        self._normalizers = list(_flat(tokenizer.get("normalizer"), "normalizers"))
        self._splits = list(_flat(tokenizer.get("pre_tokenizer"), "pretokenizers"))
        self._processors = list(_flat(tokenizer.get("post_processor"), "processors"))
        self._ids: dict[str, int] = dict(self._model["vocab"]) if self._model.get("type") == "BPE" else {}
        self._ids |= {token["content"]: token["id"] for token in self._added}

    def metadata(self, ends: Sequence[int], n_vocab: int) -> dict[str, Any]:
        model = self._model
        kind = model.get("type")
        if kind != "BPE":
            raise self._unsupported(f"a model of type {str(kind)[:20]!r}", "byte-pair encoding only")
        for option in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
            if model.get(option):
                raise self._unsupported(f"the option {option}")
        bytes_ = any(split["type"] == "ByteLevel" for split in self._splits)
        keys = self._byte_level() if bytes_ else self._characters()
        tokens, types = self._tokens(n_vocab, spelled_bytes=not bytes_)
        return {
            **keys,
            **self._special_ids(),
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.token_type": types,
            "tokenizer.ggml.merges": [self._merge(merge) for merge in model["merges"]],
            END_IDS: np.array([end for end in ends if 0 <= end < len(tokens)], np.int32),
            STRIP_RIGHT_IDS: np.array([token["id"] for token in self._added if token.get("rstrip")], np.int32),
        }

    def _byte_level(self) -> dict[str, Any]:
        nfc = False
        for normalizer in self._normalizers:
            if normalizer["type"] != "NFC":
                raise self._unsupported(f"the normalizer {normalizer['type']!r} before bytes")
            nfc = True
        splits = tuple(name for split in self._splits for name in self._split(split))
        name = _NAMES.get((splits, bool(self._model.get("ignore_merges"))))
        if name is None:
            raise self._unsupported(f"the way of cutting text into words {' then '.join(splits)[:200]!r}")
        return {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": name, "tokenizer.edgelm.nfc": nfc}

    def _split(self, split: Mapping[str, Any]) -> Iterator[str]:
        kind = split["type"]
        if kind == "ByteLevel" and not split.get("add_prefix_space"):
            if split.get("use_regex", True):
                yield _GPT2
        elif kind == "Digits" and split.get("individual_digits"):
            yield "digits"
        elif kind == "Split" and split.get("behavior") == "Isolated" and not split.get("invert"):
            yield str(split["pattern"]["Regex"])
        else:
            raise self._unsupported(f"the pre-tokenizer {kind!r} with these options")

    def _characters(self) -> dict[str, Any]:
        """Pairs of characters, spaces spelled U+2581 and unknown characters as bytes: what SentencePiece trained."""
        if not self._model.get("byte_fallback"):
            raise self._unsupported("a vocabulary that cannot spell every byte")
        prefix = ""
        replaced = False
        for normalizer in self._normalizers:
            kind = normalizer["type"]
            if kind == "Prepend" and normalizer["prepend"] == SPACE and not prefix and not replaced:
                prefix = "prepend"
            elif kind == "Replace" and (normalizer["pattern"].get("String"), normalizer["content"]) == (" ", SPACE):
                replaced = True
            else:
                raise self._unsupported(f"the normalizer {kind!r} with these options")
        for split in self._splits:
            scheme = split.get("prepend_scheme", "always" if split.get("add_prefix_space", True) else "never")
            if split["type"] == "Metaspace" and split["replacement"] == SPACE and split.get("split") is False:
                replaced, prefix = True, "" if scheme == "never" else scheme
            elif split["type"] != "Split" or split["pattern"] != {"String": " "} or not replaced:
                raise self._unsupported(f"the pre-tokenizer {split['type']!r} with these options")
        if not replaced:
            raise self._unsupported("a vocabulary of characters with plain spaces")
        return {"tokenizer.ggml.model": "bpe", "tokenizer.edgelm.space_prefix": prefix}

    def _tokens(self, n_vocab: int, *, spelled_bytes: bool) -> tuple[list[str], Any]:
        n_tokens = max(max(self._ids.values()) + 1, n_vocab)
        if not 0 < n_tokens <= _MAX_TOKENS or min(self._ids.values()) < 0:
            raise ValueError(f"{n_tokens} tokens")
        tokens = [f"[PAD{token}]" for token in range(n_tokens)]
        types = np.full(n_tokens, _UNUSED, np.int32)
        for text, token in self._ids.items():
            tokens[token] = text
            types[token] = _BYTE if spelled_bytes and _BYTE_TOKEN.fullmatch(text) else _NORMAL
        for added in self._added:
            if added.get("lstrip") or added.get("single_word"):
                raise self._unsupported(f"the token {added['content'][:40]!r}, which takes the space before it")
            types[added["id"]] = _CONTROL if added.get("special") else _USER_DEFINED
        unknown = self._model.get("unk_token")
        if unknown in self._ids:
            types[self._ids[unknown]] = _UNKNOWN
        return tokens, types

    def _special_ids(self) -> dict[str, Any]:
        keys: dict[str, Any] = {}
        roles = {"bos_token": "bos", "eos_token": "eos", "pad_token": "padding"}
        for name, role in roles.items():
            text = self._config.get(name)
            text = text.get("content") if isinstance(text, Mapping) else text
            if text in self._ids:
                keys[f"tokenizer.ggml.{role}_token_id"] = self._ids[text]
        unknown = self._model.get("unk_token")
        if unknown in self._ids:
            keys["tokenizer.ggml.unknown_token_id"] = self._ids[unknown]
        added = next((p for p in self._processors if p["type"] == "TemplateProcessing"), None)
        first, last = _around(added) if added is not None else (None, None)
        for flag, role, token in (("add_bos_token", "bos", first), ("add_eos_token", "eos", last)):
            wanted = self._config.get(flag)
            keys[f"tokenizer.ggml.{flag}"] = token is not None if wanted is not False and added else bool(wanted)
            if token is not None:
                keys[f"tokenizer.ggml.{role}_token_id"] = token
        return keys

    def _merge(self, merge: str | Sequence[str]) -> str:
        if isinstance(merge, str):
            return merge
        left, right = merge
        if " " in left or " " in right:
            raise self._unsupported("a merge of texts with spaces")
        return f"{left} {right}"

    def _unsupported(self, what: str, known: str = "") -> UnsupportedModel:
        known = known and f" (supported: {known})"
        return UnsupportedModel(
            f"{self._path}: the tokenizer has {what}, which is not supported{known}; use the model as a GGUF file"
        )


def _flat(part: Mapping[str, Any] | None, key: str) -> Iterator[Mapping[str, Any]]:
    """Yield a part of the pipeline, or the parts of a sequence."""
    if part is None:
        return
    if part["type"] == "Sequence":
        for inner in part[key]:
            yield from _flat(inner, key)
    else:
        yield part


def _around(processor: Mapping[str, Any]) -> tuple[int | None, int | None]:
    """Return the ids that a template puts before and behind a text."""
    pieces = processor["single"]
    at = ["Sequence" in piece for piece in pieces].index(True)
    before, behind = pieces[:at], pieces[at + 1 :]

    def id_of(piece: Mapping[str, Any]) -> int:
        return int(processor["special_tokens"][piece["SpecialToken"]["id"]]["ids"][0])

    return id_of(before[-1]) if before else None, id_of(behind[0]) if behind else None
