"""System messages whose keys and values are kept on flash, so that the next process need not compute them.

Written once for each model, message and type of cache, and only where computing was slow enough.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from edgelm.errors import ConfigError, ModelFileError
from edgelm.files import kept

if TYPE_CHECKING:
    from edgelm.engine.generate import Conversation
    from edgelm.files.model import ModelFile

LEAST_S = 0.1
"""What is computed in less is not worth a file: reading 1,000 tokens takes a tenth of a second, too."""


class Provided(NamedTuple):
    """How many tokens were computed, and a sentence on what was written or is wrong with a file; mostly none."""

    computed: int
    told: str


def provide(
    conversation: Conversation,
    prefix: Sequence[int],
    file: ModelFile,
    identity: str,
    progress: Callable[[int], None] | None = None,
) -> Provided:
    """Let the conversation store at least `prefix`: as it is, from flash, or computed and then kept.

    Raises what `Conversation.prefill` raises; a file that cannot be read or written costs time only.
    """
    if conversation.stores(prefix):
        return Provided(0, "")
    if reason := conversation.not_to_be_saved:
        return Provided(0, f"the system prompt is not kept: {reason}")
    path = kept.path_of(file.fingerprint, identity, conversation.kept_as, prefix)
    problem = ""
    if path.is_file():
        try:
            if conversation.restore(path, identity) == tuple(prefix):
                kept.note_use(path, file.name, len(prefix))
                return Provided(0, "")
            problem = "a kept system prompt was another one and is made anew; "
        except (ConfigError, ModelFileError, OSError) as error:
            problem = f"a kept system prompt was of no use and is made anew: {error}; "
    began_s = time.perf_counter()
    computed = conversation.prefill(prefix, progress)
    took_s = (time.perf_counter() - began_s) * len(prefix) / computed
    if took_s < LEAST_S:
        return Provided(computed, f"{problem}the system prompt is not kept: it takes {took_s:.3f} s to compute")
    try:
        kept.make_folder()
        conversation.save(path, identity)
        kept.note_use(path, file.name, len(prefix), first=True)
        kept.keep_within_limit(path)
    except (OSError, ConfigError) as error:
        fact = error.strerror if isinstance(error, OSError) else error
        return Provided(computed, f"{problem}the system prompt could not be kept in {kept.folder()}: {fact}")
    return Provided(computed, f"{problem}the system prompt's keys and values are kept in {path}, for the next start")
