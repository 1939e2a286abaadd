"""Several answers to one prompt: its keys and values are shared, and so is every pass over the weights.

Theirs is what a low-resource device can spend instead of a longer answer: the best of some ("Reasoning Models Can Be
Effective Without Thinking", arXiv:2504.09858).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from edgelm.engine.logprobs import Watched
from edgelm.errors import ConfigError
from edgelm.memory.claims import SideBySide

if TYPE_CHECKING:
    from edgelm.engine.generate import Conversation, FinishReason


@dataclass(slots=True)
class Answer:
    """What became of one answer: its ids, the sum of their log-probabilities, and why it ended."""

    ids: list[int] = field(default_factory=list)
    logprob: float = 0.0
    reason: FinishReason | None = None


def answers(
    conversation: Conversation,
    prompt: Sequence[int],
    samplers: Sequence[Watched],
    max_tokens: int,
    ends: Collection[int],
    breathe: Callable[[], None],
) -> list[Answer]:
    """Return as many answers to the prefilled `prompt` as there are samplers; `breathe` is called between passes.

    An answer that has ended takes no row of later passes. Ends with "length" where the cache has no place left.
    """
    engine = conversation.engine
    most = engine.max_rows if engine.trees else 1
    if len(samplers) > most:
        raise ConfigError(
            f"{len(samplers)} answers side by side are more than the {most} that this budget has room for; ask for "
            "fewer, or raise --memory"
        )
    found = [Answer() for _ in samplers]
    histories = [list(prompt) for _ in samplers]
    first = conversation.logits.copy()
    for i in range(len(found)):
        _draw(found[i], samplers[i], first.copy(), histories[i], ends)
    side_by_side = SideBySide(engine.arena, len(found))  # type: ignore[attr-defined]
    try:
        for _ in range(1, max_tokens):
            active = [i for i, answer in enumerate(found) if answer.reason is None]
            if not active or engine.n_past + len(active) > engine.plan.context:
                break
            breathe()
            rows = engine.extend([histories[i][-1] for i in active], side_by_side, active)  # type: ignore[attr-defined]
            conversation.counts.passes += 1
            for row, i in enumerate(active):
                _draw(found[i], samplers[i], rows[row], histories[i], ends)
    finally:
        conversation.forget_after(len(prompt))
    for answer in found:
        answer.reason = answer.reason or "length"
    return found


def _draw(answer: Answer, sampler: Watched, logits: object, history: list[int], ends: Collection[int]) -> None:
    token = sampler(logits, history)  # type: ignore[arg-type]
    noted = sampler.noted.popleft()
    history.append(token)
    answer.logprob += noted.logprob
    if token in ends:
        answer.reason = "stop"
    else:
        answer.ids.append(token)
