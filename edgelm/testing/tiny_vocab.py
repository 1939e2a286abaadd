"""Small vocabularies for tiny models: byte-level BPE and SentencePiece, each able to spell any text.

Knows the metadata keys of `tokenizer.ggml`; not how to tokenize.
"""

from __future__ import annotations

from typing import Any

import numpy as np

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # token types of GGUF

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

_MERGES = (
    "Ġ t", "h e", "Ġ a", "i n", "r e", "Ġt he", "e r", "o n", "Ġ s", "n d", "Ġ w", "a t", "Ġa nd", "o u", "e n",
    "Ġ o", "i s", "i t", "Ġ b", "Ġ c", "Ġo f", "o r", "in g", "l l", "a n", "Ġ in", "Ġt o", "e s", "1 2", "Ġ Ġ",
)  # fmt: skip
_PIECES = (
    "▁t", "he", "▁a", "in", "re", "▁the", "er", "on", "▁s", "nd", "▁w", "at", "▁and", "ou", "en", "▁o", "is", "it",
    "▁b", "▁c", "▁of", "or", "ing", "ll", "an", "▁in", "▁to", "es", "12", "▁▁",
)  # fmt: skip
_CHARACTERS = "▁etaoinshrdlcumwfgypbvkjxqzETAOINSHRDLC0123456789.,!?'-é漢\n"


def gpt2_vocab(pre: str, n_vocab: int = 0) -> dict[str, Any]:
    """Return the metadata of a byte-level BPE vocabulary; unused tokens fill it up to `n_vocab`."""
    tokens = [_BYTE_LETTERS[byte] for byte in range(256)] + [merge.replace(" ", "") for merge in _MERGES]
    control = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    types = [NORMAL] * len(tokens) + [CONTROL] * len(control)
    tokens += control
    n_real = len(tokens)
    _fill_up(tokens, types, n_vocab)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": np.asarray(types, dtype=np.int32),
        "tokenizer.ggml.merges": list(_MERGES),
        "tokenizer.ggml.bos_token_id": n_real - 3,
        "tokenizer.ggml.eos_token_id": n_real - 1,
        "tokenizer.ggml.padding_token_id": n_real - 3,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": CHAT_TEMPLATE,
    }


def llama_vocab(n_vocab: int = 0) -> dict[str, Any]:
    """Return the metadata of a SentencePiece vocabulary; unused tokens fill it up to `n_vocab`."""
    tokens = ["<unk>", "<s>", "</s>"] + [f"<0x{byte:02X}>" for byte in range(256)]
    types = [UNKNOWN, CONTROL, CONTROL] + [BYTE] * 256
    pieces = [*_PIECES, *_CHARACTERS]
    scores = [0.0] * len(tokens) + [-float(rank) for rank in range(len(pieces))]
    tokens, types = tokens + pieces, types + [NORMAL] * len(pieces)
    tokens, types = [*tokens, "<|im_start|>", "<|im_end|>"], [*types, CONTROL, CONTROL]
    n_real = len(tokens)
    _fill_up(tokens, types, n_vocab)
    scores += [-1000.0] * (len(tokens) - len(scores))
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": np.asarray(scores, dtype=np.float32),
        "tokenizer.ggml.token_type": np.asarray(types, dtype=np.int32),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.eot_token_id": n_real - 1,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_eos_token": False,
        "tokenizer.ggml.add_space_prefix": True,
        "tokenizer.chat_template": CHAT_TEMPLATE,
    }


def _fill_up(tokens: list[str], types: list[int], n_vocab: int) -> None:
    assert n_vocab == 0 or n_vocab >= len(tokens), f"the tiny vocabulary has {len(tokens)} tokens already"
    for index in range(len(tokens), n_vocab):
        tokens.append(f"[unused{index}]")
        types.append(UNUSED)


def _byte_letters() -> list[str]:
    """Return GPT-2's letter for each byte: itself if printable, else the next letter from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) if byte in printable else chr(0x100 + hidden.index(byte)) for byte in range(256)]


_BYTE_LETTERS = _byte_letters()


def bert_vocab() -> dict[str, Any]:
    """Return the metadata of a WordPiece vocabulary, as converters write it: pieces that begin a word have a mark."""
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    types = [CONTROL] * len(tokens)
    letters = [char.lower() for char in _CHARACTERS if char.strip() and char != "▁"]
    pieces = dict.fromkeys(["▁" + letter for letter in letters] + [letter for letter in letters if letter.isalnum()])
    pieces |= dict.fromkeys(piece for piece in _PIECES if piece.strip("▁"))
    pieces |= dict.fromkeys(["▁weather", "▁town", "▁cold", "▁again", "▁é", "ß", "▁ß", "▁字", "▁¿", "▁the", "ies", "s"])
    tokens += pieces
    types += [NORMAL] * len(pieces)
    return {
        "tokenizer.ggml.model": "bert",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": np.asarray(types, dtype=np.int32),
        "tokenizer.ggml.token_type_count": 2,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.ggml.unknown_token_id": 1,
        "tokenizer.ggml.bos_token_id": 2,
        "tokenizer.ggml.cls_token_id": 2,
        "tokenizer.ggml.seperator_token_id": 3,
        "tokenizer.ggml.mask_token_id": 4,
    }
