"""WordPiece, as libllama does it for BERT: words are cleaned and cut, then the longest pieces from the left are taken.

Knows tables and characters; knows no special tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from unicodedata import category, normalize

from edgelm.text.encoders import SPACE, WordCache
from edgelm.text.tables import Tables

_WHITE_SPACE = frozenset("\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000") | {
    chr(point) for point in range(0x2000, 0x200B)
}
_CONTROL = ("Cc", "Cf", "Co", "Cs")  # not those that Unicode has not assigned
_IDEOGRAPHS = (
    (0x4E00, 0x9FFF),
    (0x3400, 0x4DBF),
    (0x20000, 0x2A6DF),
    (0x2A700, 0x2B73F),
    (0x2B740, 0x2B81F),
    (0x2B920, 0x2CEAF),
    (0xF900, 0xFAFF),
    (0x2F800, 0x2FA1F),
)


class WordPieceEncoder:
    """Texts to the ids of pieces; a word that cannot be spelled is one unknown token."""

    def __init__(self, tables: Tables) -> None:
        self._tables = tables
        self._lowercase: bool = tables.meta["lowercase"]
        self._strip_accents: bool = tables.meta["strip_accents"]
        self._unknown: int = tables.meta["ids"]["unk"]
        offsets = tables.offsets
        self._longest = max(offsets[token + 1] - offsets[token] for token in range(tables.n_tokens))
        self._word = WordCache(self._encode_word)

    def encode(self, text: str, after_special: bool) -> Iterator[int]:
        for word in self._words(text):
            yield from self._word(word)

    def _words(self, text: str) -> Iterator[str]:
        """Yield the words of `text`: between white space, with punctuation and ideographs by themselves."""
        word = ""
        for char in text:
            role, char = _cleaned(char, self._lowercase, self._strip_accents)
            if role == "part":
                word += char
            elif role != "dropped":
                if word:
                    yield word
                word = ""
                if role == "alone":
                    yield char
        if word:
            yield word

    def _encode_word(self, word: str) -> tuple[int, ...]:
        raw, ids, at = (SPACE + word).encode(), list[int](), 0
        while at < len(raw):
            for end in range(min(len(raw), at + self._longest), at, -1):
                token = self._tables.find_token(raw[at:end])
                if token >= 0:
                    break
            else:
                return (self._unknown,)
            ids.append(token)
            at = end
        return tuple(ids)

    def piece(self, text: bytes) -> bytes:
        return text.replace(SPACE.encode(), b" ")


@lru_cache(maxsize=4096)
def _cleaned(char: str, lowercase: bool, strip_accents: bool) -> tuple[str, str]:
    """Say whether a character is a "part" of a word, a word "alone", a "space" or "dropped"; and what it becomes."""
    if strip_accents:
        char = normalize("NFD", char)[0]  # what follows the first would be accents
    if char in _WHITE_SPACE:
        return "space", char
    kind = category(char)
    if char in "\0\ufffd" or kind in _CONTROL or (strip_accents and kind[0] == "M"):
        return "dropped", char
    alone = kind[0] == "P" or (kind[0] == "S" and ord(char) < 0x7F)
    alone = alone or any(first <= ord(char) <= last for first, last in _IDEOGRAPHS)
    return "alone" if alone else "part", char.lower()[0] if lowercase else char
