"""How likely a model finds given ids, as `Model.score` gives it."""

from __future__ import annotations

from collections.abc import Sequence

from edgelm.engine.generate import Conversation
from edgelm.engine.logprobs import scored
from edgelm.errors import ConfigError, ContextOverflow
from edgelm.turns import Turns
from edgelm.usage import Score


def score_of(conversation: Conversation, turns: Turns, ids: Sequence[int], n_given: int) -> Score:
    """Return the log-probabilities of `ids[n_given:]`, in a turn of its own."""
    if not 1 <= n_given < len(ids):
        raise ConfigError(f"{n_given} of {len(ids)} tokens are given: give at least one before and one to score")
    context = conversation.engine.plan.context
    if len(ids) > context:
        raise ContextOverflow(len(ids), context)
    turn, values = turns.ask(), []
    with turns.held(turn, None):
        for value in scored(conversation, ids, n_given):
            values.append(value)
            turns.breathe(turn)
    return Score(tuple(ids[n_given:]), tuple(values))
