"""Several answers to one prompt: its keys and values are shared, and so is every pass over the weights.

Theirs is what a low-resource device can spend instead of a longer answer: the best of some ("Reasoning Models Can Be
Effective Without Thinking", arXiv:2504.09858).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from edgelm.engine.forward import Engine
from edgelm.engine.logprobs import Watched
from edgelm.engine.running import Running
from edgelm.errors import Cancelled, ConfigError, ContextOverflow
from edgelm.memory.claims import SideBySide, tokens_each

if TYPE_CHECKING:
    from edgelm.engine.generate import Conversation, FinishReason
    from edgelm.engine.sampling import Logits


@dataclass(slots=True)
class Answer:
    """What became of one answer: its ids, the sum of their log-probabilities, and why it ended."""

    ids: list[int] = field(default_factory=list)
    logprob: float = 0.0
    reason: FinishReason | None = None

    @property
    def mean_logprob(self) -> float:
        return self.logprob / max(len(self.ids), 1)


def longest(engine: Running, n_prompt: int, n: int, max_tokens: int | None) -> int:
    """Return how long each of `n` answers can be, at most `max_tokens`.

    Raises `ContextOverflow` if the context has no room for one token of each, `ConfigError` where the engine cannot
    hold answers side by side, or has no room for so many.
    """
    if not isinstance(engine, Engine) or not engine.trees:
        raise ConfigError(
            "this model computes one answer at a time: answers side by side need all keys and values in memory, and "
            "more than an ONNX graph; ask for one, or use a GGUF file with a context that fits"
        )
    if n > engine.max_rows:
        raise ConfigError(
            f"{n} answers side by side are more than the {engine.max_rows} that this plan has room for; load the "
            f"model with parallel={n}"
        )
    in_context, in_rings = tokens_each(engine.arena, n_prompt, n)
    if in_context < 1:
        raise ContextOverflow(n_prompt + n, engine.plan.context)
    most = min(max_tokens or in_context + 1, in_context + 1)  # the last token is drawn, not stored
    if most > in_rings + 1:
        raise ConfigError(
            f"{n} answers of {most} tokens need more room in the sliding windows of this model than was planned; load "
            f"it with parallel={n}, or ask for max_tokens up to {in_rings + 1}"
        )
    return most


def answers(
    conversation: Conversation,
    prompt: Sequence[int],
    samplers: Sequence[Watched],
    max_tokens: int,
    ends: Collection[int],
    breathe: Callable[[], None],
    is_over: Callable[[int, int], bool],
) -> list[Answer]:
    """Return as many answers to the prefilled `prompt` as there are samplers, of what `longest` allows.

    An answer that has ended takes no row of later passes: with an id of `ends`, or where `is_over(answer, id)` says so.
    `breathe` is called between passes. Where a pass is broken off, those that were not done end with "cancelled".
    """
    engine = conversation.engine
    assert isinstance(engine, Engine), "see `longest`"
    found = [Answer() for _ in samplers]
    histories = [list(prompt) for _ in samplers]

    def draw(i: int, logits: Logits) -> None:
        answer, sampler = found[i], samplers[i]
        token = sampler(logits, histories[i])
        histories[i].append(token)
        logprob = sampler.noted.popleft().logprob
        if token in ends:
            answer.reason = "stop"
            answer.logprob += 0.0 if answer.ids else logprob  # an empty answer is as likely as its end
            return
        answer.logprob += logprob
        answer.ids.append(token)
        if is_over(i, token):
            answer.reason = "stop"
        elif len(answer.ids) == max_tokens:
            answer.reason = "length"

    first = conversation.logits.copy()
    for i in range(len(found)):
        draw(i, first.copy())
    side_by_side = SideBySide(engine.arena, len(found))
    try:
        while active := [i for i, answer in enumerate(found) if answer.reason is None]:
            breathe()
            # another budget may have fewer rows since then: more passes, the same answers
            for start in range(0, len(active), engine.max_rows):
                some = active[start : start + engine.max_rows]
                rows = engine.extend([histories[i][-1] for i in some], side_by_side, some)
                conversation.counts.passes += 1
                for row, i in enumerate(some):
                    draw(i, rows[row])
    except Cancelled:
        for answer in found:
            answer.reason = answer.reason or "cancelled"
    finally:
        conversation.forget_after(len(prompt))
    return found
