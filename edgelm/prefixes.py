"""System messages whose keys and values are kept on flash, so that the next process need not compute them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from edgelm.errors import ModelFileError
from edgelm.files import kept

if TYPE_CHECKING:
    from edgelm.engine.generate import Conversation

LEAST_TOKENS = 64
"""Shorter prefixes are computed faster than they are read."""


def provide(conversation: Conversation, prefix: Sequence[int], identity: str, model: str, kv: str) -> str:
    """Let the conversation store at least `prefix`: as it is, from flash, or computed and then kept.

    `kv`: the types of its keys and values. What was kept in fewer bits is not taken for more, nor the other way round.
    Returns a sentence on what was written, or what is wrong with a kept file; empty if there is nothing to say.
    """
    if len(prefix) < LEAST_TOKENS or conversation.stores(prefix):
        return ""
    path = kept.path_of(f"{identity} {kv}", prefix)
    problem = ""
    if path.is_file():
        try:
            if conversation.restore(path, identity) == tuple(prefix):
                kept.note_use(path, model, len(prefix))
                return ""
        except (ModelFileError, OSError) as error:
            problem = f"a kept system prompt was of no use and is made anew: {error}; "
    conversation.prefill(prefix)
    try:
        kept.folder().mkdir(parents=True, exist_ok=True)
        conversation.save(path, identity)
        kept.note_use(path, model, len(prefix), first=True)
        kept.keep_within_limit(path)
    except OSError as error:
        return f"{problem}the system prompt could not be kept: {error.strerror}; set EDGELM_CACHE to a writable folder"
    return f"{problem}the system prompt's keys and values are kept in {path}, for the next start"
