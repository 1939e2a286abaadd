"""Which tokens are special, which end a generation, and where special texts cut a prompt, as libllama decides it.

Knows attribute bits and token texts; knows neither merges nor templates.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableSequence, Sequence
from typing import Any

from edgelm.text.tables import CONTROL, NORMAL, STRIP_RIGHT, UNKNOWN, USER_DEFINED, Tables

Find = Callable[[bytes], int]

# keys of edgelm's own, for tokenizers that do not come from a GGUF header
END_IDS, STRIP_RIGHT_IDS = "tokenizer.edgelm.end_ids", "tokenizer.edgelm.strip_right_ids"

END_TEXTS = (
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "<end_of_turn>",
    "<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>",
    "<end_of_utterance>", "<eos>", "<turn|>", "<|tool_response>", "<｜end▁of▁sentence｜>", "[e~[",
)  # fmt: skip
_FILL_TEXTS = {  # fill-in-the-middle roles: found by name where the file does not name them
    "fim_pre": ("<|fim_prefix|>", "<fim-prefix>", "<fim_prefix>", "<｜fim▁begin｜>", "<PRE>", "▁<PRE>",
                "<|code_prefix|>", "<|prefix|>"),
    "fim_suf": ("<|fim_suffix|>", "<fim-suffix>", "<fim_suffix>", "<｜fim▁hole｜>", "<SUF>", "▁<SUF>",
                "<|code_suffix|>", "<|suffix|>"),
    "fim_mid": ("<|fim_middle|>", "<fim-middle>", "<fim_middle>", "<｜fim▁end｜>", "<MID>", "▁<MID>",
                "<|code_middle|>", "<|middle|>"),
    "fim_pad": ("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"),
    "fim_rep": ("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"),
    "fim_sep": ("<|file_sep|>",),
}  # fmt: skip
_KEYS = {
    "bos": ("bos_token_id",), "eos": ("eos_token_id",), "eot": ("eot_token_id",), "eom": ("eom_token_id",),
    "unk": ("unknown_token_id",), "fim_pre": ("fim_pre_token_id", "prefix_token_id"),
    "fim_suf": ("fim_suf_token_id", "suffix_token_id"), "fim_mid": ("fim_mid_token_id", "middle_token_id"),
    "fim_pad": ("fim_pad_token_id",), "fim_rep": ("fim_rep_token_id",), "fim_sep": ("fim_sep_token_id",),
}  # fmt: skip
_ALWAYS_SHOWN = ("<|channel|>", "<|message|>", "<|start|>", "<|constrain|>")


def special_ids(metadata: Mapping[str, Any], n_tokens: int, defaults: Mapping[str, int]) -> dict[str, int]:
    """Return the ids of bos, eos, ... that the file names, else the kind's defaults; ids out of range are none."""
    ids = {role: token for role, token in defaults.items() if token < n_tokens}
    for role, keys in _KEYS.items():
        for key in keys:
            token = metadata.get(f"tokenizer.ggml.{key}")
            if isinstance(token, int) and 0 <= token < n_tokens:
                ids[role] = token
    return ids


def settle(attrs: MutableSequence[int], find: Find, text_of: Callable[[int], bytes], ids: dict[str, int]) -> list[int]:
    """Return the ids that end a generation; correct `attrs`, and complete `ids` by name, as libllama does."""
    for role, texts in _FILL_TEXTS.items():
        if role not in ids:
            found = [token for text in texts if (token := find(text.encode())) >= 0]
            if found:
                ids[role] = min(found)
                attrs[ids[role]] |= CONTROL
    ends = {ids[role] for role in ("fim_pad", "fim_rep", "fim_sep") if role in ids}
    for text in END_TEXTS:
        if (token := find(text.encode())) >= 0:
            ends.add(token)
            attrs[token] |= CONTROL
    for text in _ALWAYS_SHOWN:
        if (token := find(text.encode())) >= 0:
            attrs[token] = USER_DEFINED
    ends |= {ids[role] for role in ("eos", "eot", "eom") if role in ids}
    _drop_false_ends(attrs, {text_of(token): token for token in ends}, ends)
    return sorted(ends)


def _drop_false_ends(attrs: MutableSequence[int], by_text: Mapping[bytes, int], ends: set[int]) -> None:
    """Undo two names: in gpt-oss and solar `<|end|>` ends a message only, in gemma4 and plamo `</s>` is text."""
    calls = b"<|call|>" in by_text or b"<|calls|>" in by_text
    if calls and b"<|end|>" in by_text and (b"<|return|>" in by_text or b"<|flush|>" in by_text):
        ends.discard(by_text[b"<|end|>"])
        attrs[by_text[b"<|end|>"]] = USER_DEFINED
    if b"</s>" in by_text and (b"<|tool_response>" in by_text or b"<|plamo:eos|>" in by_text):
        ends.discard(by_text[b"</s>"])
        attrs[by_text[b"</s>"]] = NORMAL


def strip_right(attrs: MutableSequence[int], special: Sequence[int], find: Find) -> None:
    """Mark the special tokens of Phi-3, which swallow the white space after them."""
    for token in special:
        attrs[token] |= STRIP_RIGHT
    if (token := find(b"</s>")) >= 0:
        attrs[token] |= STRIP_RIGHT
    for text in (b"<unk>", b"<s>", b"<|endoftext|>"):
        if (token := find(text)) >= 0:
            attrs[token] &= ~STRIP_RIGHT


class SpecialTexts:
    """Finds the texts of special tokens. Longer ones win over the whole text, as in libllama."""

    def __init__(self, tables: Tables) -> None:
        self._tables = tables
        self._ids: list[int] = tables.meta["special"]  # longest text first
        self._groups: dict[bytes, list[int]] | None = None

    def occurring(self, text: bytes, *, without: int = 0) -> list[int]:
        """Return the special tokens whose text occurs in `text`, longest first, without those of the bits `without`."""
        if self._groups is None:
            # By the first two bytes: thousands of `<unused..>` cost one search where the text has no `<u`.
            self._groups = {}
            for order, token in enumerate(self._ids):
                self._groups.setdefault(self._tables.text(token)[:2], []).append(order)
        orders: list[int] = []
        for prefix, group in self._groups.items():
            if prefix in text:
                orders += [order for order in group if self._tables.text(self._ids[order]) in text]
        attrs = self._tables.attrs
        return [token for order in sorted(orders) if not attrs[token := self._ids[order]] & without]

    def partition(self, text: bytes, *, parse_special: bool) -> list[bytes | int]:
        """Cut `text` into texts and the ids of the special tokens between them.

        User-defined tokens are always cut out; control and unknown tokens only with `parse_special`.
        """
        parts: list[bytes | int] = [text] if text else []
        for token in self.occurring(text, without=0 if parse_special else CONTROL | UNKNOWN):
            pattern, strips = self._tables.text(token), self._tables.attrs[token] & STRIP_RIGHT
            cut: list[bytes | int] = []
            for part in parts:
                if isinstance(part, int) or pattern not in part:
                    cut.append(part)
                else:
                    cut += _cut(part, pattern, token, bool(strips))
            parts = cut
        return parts


def _cut(part: bytes, pattern: bytes, token: int, strips: bool) -> list[bytes | int]:
    cut: list[bytes | int] = []
    start = 0
    while (at := part.find(pattern, start)) >= 0:
        if at > start:
            cut.append(part[start:at])
        cut.append(token)
        start = at + len(pattern)
        while strips and start < len(part) and part[start] in b" \t\n\v\f\r":
            start += 1
    if start < len(part):
        cut.append(part[start:])
    return cut
