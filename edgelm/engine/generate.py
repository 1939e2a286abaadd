"""From ids to ids: prefill, sample, append, until something ends it. Knows no text.

The innermost of the nested generators; `edgelm.model` puts text and statistics around it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Generator, Sequence
from typing import Literal

from edgelm.engine.running import Running
from edgelm.engine.sampling import Sampler
from edgelm.errors import ContextOverflow

FinishReason = Literal["stop", "length", "cancelled", "timeout"]


class Conversation:
    """An engine and the ids whose keys and values it holds, so that a prompt only computes what is new."""

    def __init__(self, engine: Running) -> None:
        self.engine = engine
        self._stored: list[int] = []

    def prefill(self, ids: Sequence[int], progress: Callable[[int], None] | None = None) -> int:
        """Append what is not stored yet of `ids`; return how many tokens were computed.

        `progress` is called between passes, with the tokens done. Logits of the last id are then in `logits`. Raises
        `ContextOverflow` before anything is computed.
        """
        context = self.engine.plan.context
        if len(ids) >= context:
            raise ContextOverflow(len(ids), context)
        common = 0
        for ours, theirs in zip(self._stored, ids[:-1], strict=False):  # the last one is computed for its logits
            if ours != theirs:
                break
            common += 1
        kept = self.engine.truncate(common)
        del self._stored[kept:]
        self._forward(ids[kept:], progress)
        return len(ids) - kept

    def step(self, token: int) -> None:
        """Append one token."""
        self._forward([token])

    @property
    def is_full(self) -> bool:
        """Whether no further token can be appended."""
        return self.engine.n_past >= self.engine.plan.context

    def _forward(self, ids: Sequence[int], progress: Callable[[int], None] | None = None) -> None:
        done = len(self._stored)
        try:
            self.logits = self.engine.forward(ids, progress=progress)[-1]
        finally:
            # a pass that was broken off may have cost older positions of a sliding window: then nothing is kept
            stored = self.engine.n_past
            self._stored.extend(ids[: max(stored - done, 0)])
            del self._stored[stored:]


def token_ids(
    conversation: Conversation,
    prompt: Sequence[int],
    sampler: Sampler,
    *,
    max_tokens: int,
    ends: Collection[int] = (),
) -> Generator[int, None, FinishReason]:
    """Yield the ids that follow the prefilled `prompt`; return why it ended. An id of `ends` is not yielded."""
    history = list(prompt)
    for count in range(1, max_tokens + 1):
        began = time.perf_counter()
        token = sampler(conversation.logits, history)
        conversation.engine.times.add("sample", count, began)
        if token in ends:
            return "stop"
        history.append(token)
        yield token
        if count < max_tokens:
            if conversation.is_full:
                return "length"
            conversation.step(token)
    return "length"
