"""Log-probabilities: of the ids that a sampler draws, and of ids that are given.

Always the model's own distribution, from the raw logits: before penalties, temperature and truncation, as the API that
everybody copies has it.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from edgelm.engine.largest import largest
from edgelm.engine.passes import width_for
from edgelm.engine.sampling import Logits, Sampler

if TYPE_CHECKING:
    from edgelm.engine.generate import Conversation

MOST = 20
"""Alternatives that can be asked for."""


class LogProbs(NamedTuple):
    """The log-probability of an id that was drawn, and the likeliest ids with theirs, the likeliest first."""

    logprob: float
    top: tuple[tuple[int, float], ...]


def log_sum(logits: Logits) -> float:
    """Return the logarithm of the sum of exp(logits)."""
    highest = float(logits.max())
    return highest + math.log(float(np.exp(logits - np.float32(highest)).sum(dtype=np.float64)))


class Watched:
    """A sampler that notes the log-probabilities of what it draws, in order, for whoever takes them away."""

    def __init__(self, sampler: Sampler, n_top: int) -> None:
        self._sampler, self._n_top = sampler, n_top
        self.noted: deque[LogProbs] = deque()
        self.forced = getattr(sampler, "forced", _nothing)

    @property
    def closed(self) -> bool:
        """Whether the sampler brought an answer to an end; see `edgelm.structured`."""
        return bool(getattr(self._sampler, "closed", False))

    def __call__(self, logits: Logits, history: Sequence[int]) -> int:
        total = log_sum(logits)
        ids = largest(logits, min(self._n_top, len(logits))) if self._n_top else ()
        top = tuple((int(one), float(logits[one]) - total) for one in ids)
        raw = logits.copy()  # samplers write to what they are given
        token = self._sampler(logits, history)
        self.noted.append(LogProbs(float(raw[token]) - total, top))
        return token


def _nothing(history: Sequence[int]) -> Sequence[int]:
    return ()


def scored(conversation: Conversation, ids: Sequence[int], n_given: int) -> Generator[float, None, None]:
    """Yield the log-probability of every id from `ids[n_given]` on, given all before it; `n_given` is at least 1."""
    conversation.prefill(ids[:n_given])
    yield float(conversation.logits[ids[n_given]]) - log_sum(conversation.logits)
    at = n_given
    while at + 1 < len(ids):
        n = width_for(len(ids) - 1 - at, conversation.engine.max_rows)
        rows = conversation.verify(ids[at : at + n], range(-1, n - 1))
        for row in range(n):
            logits = rows[row]
            yield float(logits[ids[at + row + 1]]) - log_sum(logits)
        conversation.keep(range(n))
        at += n
