"""Text to token ids and back, with the same ids as llama.cpp on the same file.

Knows special tokens and prompts; the algorithms are in encoders, the data in tables.
"""

from __future__ import annotations

import codecs
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING
from unicodedata import normalize

from edgelm.errors import ModelFileError
from edgelm.text.cache import cached_tables
from edgelm.text.encoders import ByteLevelEncoder, Encoder, RawPairEncoder, ScoreEncoder
from edgelm.text.pretokenize import WHOLE, pre_tokenizer
from edgelm.text.prompt import Prompt
from edgelm.text.special import SpecialTexts
from edgelm.text.tables import BYTE, CONTROL, FORMAT, NORMAL, UNKNOWN, USER_DEFINED, BadTables, Tables
from edgelm.text.word_pieces import WordPieceEncoder

if TYPE_CHECKING:
    from edgelm.text.build import ModelHeader


def load_tokenizer(model: ModelHeader, *, cache_dir: Path | None = None) -> Tokenizer:
    """Return the tokenizer of an opened model.

    A pack has its tables inside. Others are built on first use and mapped from `cache_dir` afterwards (default: under
    `$EDGELM_CACHE` or the user's cache folder). Raises `UnsupportedModel` for a kind of tokenizer that edgelm does not
    have, `ModelFileError` for a pack with damaged tables.
    """
    if model.pack is not None and (packed := model.pack.tokenizer_tables(FORMAT)) is not None:
        try:
            return Tokenizer(Tables(packed))
        except (BadTables, LookupError, TypeError, ValueError, struct.error) as error:
            raise ModelFileError(
                model.pack.path, f"the tokenizer section of the pack makes no sense ({error})"
            ) from error

    def build() -> list[bytes]:
        from edgelm.text.build import build_tables

        return build_tables(model.metadata)

    return Tokenizer(cached_tables(model.fingerprint, build, cache_dir))


class Tokenizer:
    """Ids and texts of one vocabulary. Not for use from two threads at once."""

    def __init__(self, tables: Tables) -> None:
        self._tables = tables
        meta = tables.meta
        ids: dict[str, int] = meta["ids"]
        self.n_vocab: int = tables.n_tokens
        self.bos_id: int | None = ids.get("bos")
        self.eos_id: int | None = ids.get("eos")
        self.eos_ids: frozenset[int] = frozenset(meta["ends"])
        """Every id that ends a generation: end of text, of turn, of message."""
        self.adds_bos: bool = meta["add_bos"] and self.bos_id is not None
        self._adds_eos: bool = meta["add_eos"] and self.eos_id is not None
        self._nfc: bool = meta.get("nfc", False)
        self._prefix_once = meta.get("space_prefix") == "first"
        self._specials = SpecialTexts(tables)
        self._encoder = _encoder_for(tables)
        self._containing: dict[frozenset[str], frozenset[int]] = {}

    @property
    def special_tokens(self) -> dict[str, int]:
        """Text and id of every control, unknown and user-defined token; made anew at each call."""
        return {self.token_bytes(token).decode("utf-8", "replace"): token for token in self._tables.meta["special"]}

    def encode(self, text: str, *, parse_special: bool = False, add_bos: bool | None = None) -> list[int]:
        """Return the ids of `text`.

        With `parse_special`, texts such as `<|im_end|>` become their special token. `add_bos`: None adds what the
        file asks for (begin, and for some files end of text), True the beginning only, False nothing. Surrogate
        pairs count as the character they mean, lone surrogates as U+FFFD.
        """
        ids = [self.bos_id] if self.bos_id is not None and (self.adds_bos if add_bos is None else add_bos) else []
        self._encode_parts(ids, _well_formed(text).encode(), parse_special, Prompt(""))
        if add_bos is None and self._adds_eos and self.eos_id is not None:
            ids.append(self.eos_id)
        return ids

    def encode_prompt(self, prompt: Prompt) -> list[int]:
        """Return the ids of a rendered prompt: special tokens where the template wrote them, nowhere else.

        A beginning of text that the file asks for stands there once, whether or not the template writes it.
        """
        ids: list[int] = []
        self._encode_parts(ids, _well_formed(prompt.guarded).encode(), True, prompt)
        if self.adds_bos and self.bos_id is not None and ids[:1] != [self.bos_id]:
            ids.insert(0, self.bos_id)
        return ids

    def _encode_parts(self, ids: list[int], text: bytes, parse_special: bool, prompt: Prompt) -> None:
        after_special = True
        for part in self._specials.partition(text, parse_special=parse_special):
            if isinstance(part, int):
                ids.append(part)
                after_special = not self._prefix_once
            else:
                plain = prompt.restore(part.decode())
                ids.extend(self._encoder.encode(normalize("NFC", plain) if self._nfc else plain, after_special))
                after_special = False

    def token_bytes(self, token: int) -> bytes:
        """Return what `token` adds to a text; of a special token, its name. Ids beyond the vocabulary add nothing.

        A token may hold part of a character.
        """
        if not 0 <= token < self.n_vocab:
            return b""
        attr = self._tables.attrs[token]
        text = self._tables.text(token)
        if attr & (UNKNOWN | CONTROL | USER_DEFINED):
            return text
        if attr & NORMAL:
            return self._encoder.piece(text)
        if attr & BYTE:
            try:
                return bytes((int(text[3:5], 16),))
            except ValueError:
                return b""
        return b""

    def is_special(self, token: int) -> bool:
        """Say whether `token` is a control or unknown token, which is not shown to the user."""
        return 0 <= token < self.n_vocab and bool(self._tables.attrs[token] & (CONTROL | UNKNOWN))

    def decode(self, ids: Iterable[int], *, special: bool = False) -> str:
        """Return the text of `ids`, with `special` also the names of special tokens.

        Bytes that are not UTF-8 become U+FFFD. The space that some vocabularies put before a text is taken away.
        """
        shown = [token for token in ids if special or not self.is_special(token)]
        text = b"".join(map(self.token_bytes, shown))
        if self._tables.meta["add_space_prefix"] and text.startswith(b" "):
            first_text = next(token for token in shown if self.token_bytes(token))
            text = text if self.is_special(first_text) else text[1:]
        return text.decode("utf-8", "replace")

    def incremental(self, *, special: bool = False) -> IncrementalDecoder:
        """Return a decoder for ids that come one by one."""
        return IncrementalDecoder(self, special)

    def specials_in(self, text: str, *, user_defined: bool = True) -> list[str]:
        """Return the texts of special tokens that occur in `text`, longest first."""
        without = 0 if user_defined else USER_DEFINED
        found = self._specials.occurring(_well_formed(text).encode(), without=without)
        return [self._tables.text(token).decode("utf-8", "replace") for token in found]

    def containing(self, texts: frozenset[str]) -> frozenset[int]:
        """Return the ids of tokens that contain any of `texts`. Looks through the vocabulary, once for each set."""
        if texts not in self._containing:
            wanted = [text.encode() for text in texts]
            pieces = ((token, self.token_bytes(token)) for token in range(self.n_vocab))
            self._containing[texts] = frozenset(
                token for token, piece in pieces if any(text in piece for text in wanted)
            )
        return self._containing[texts]

    def find(self, text: str) -> int | None:
        """Return the id of the token spelled `text`, or None."""
        token = self._tables.find_token(text.encode())
        return token if token >= 0 else None


class IncrementalDecoder:
    """Turns ids into text as they come; half a character waits for its other half."""

    def __init__(self, tokenizer: Tokenizer, special: bool) -> None:
        self._tokenizer, self._special = tokenizer, special
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, token: int) -> str:
        """Return the text that `token` completes, possibly none."""
        if not self._special and self._tokenizer.is_special(token):
            return ""
        return self._utf8.decode(self._tokenizer.token_bytes(token))

    def flush(self) -> str:
        """Return U+FFFD for a character that stayed unfinished, and begin anew."""
        rest = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return rest


def _encoder_for(tables: Tables) -> Encoder:
    if tables.meta["kind"] == "llama":
        return ScoreEncoder(tables)
    if tables.meta["kind"] == "bert":
        return WordPieceEncoder(tables)
    if tables.meta["kind"] == "bpe":
        return RawPairEncoder(tables, WHOLE)
    pre = pre_tokenizer(tables.meta["pre"])
    return RawPairEncoder(tables, pre) if pre.raw else ByteLevelEncoder(tables, pre)


def _well_formed(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
