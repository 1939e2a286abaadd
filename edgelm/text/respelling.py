"""The same text in other tokens: what a model has said in its own spelling, and the tokenizer would spell otherwise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from edgelm.text.tokenizer import Tokenizer


def respelled(tokenizer: Tokenizer, ids: Sequence[int], known: Sequence[int]) -> list[int]:
    """Return ids of the same text as `ids`, which begin as `known` does for as long as the two texts agree.

    Special tokens are themselves, whatever a text may spell: nothing that a user wrote becomes one, nor the reverse.
    """
    ours = theirs = 0  # tokens that were looked at
    our_text = their_text = b""  # what the one has more than the other; one of them is empty
    same = (0, 0)
    while True:
        if not our_text and not their_text:
            same = (ours, theirs)
            while ours < len(known) and theirs < len(ids) and known[ours] == ids[theirs]:
                ours, theirs = ours + 1, theirs + 1
                same = (ours, theirs)
        behind, at = (known, ours) if len(our_text) <= len(their_text) else (ids, theirs)
        if at >= len(behind) or tokenizer.is_special(behind[at]):
            break
        piece = tokenizer.token_bytes(behind[at])
        if behind is known:
            our_text, ours = our_text + piece, ours + 1
        else:
            their_text, theirs = their_text + piece, theirs + 1
        shared = min(len(our_text), len(their_text))
        if our_text[:shared] != their_text[:shared]:
            break
        our_text, their_text = our_text[shared:], their_text[shared:]
    return [*known[: same[0]], *ids[same[1] :]]
