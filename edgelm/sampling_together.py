"""Several answers to one prompt at a time, as `Model.samples` gives them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from edgelm.engine.logprobs import Watched
from edgelm.engine.samples import answers
from edgelm.engine.sampling import make_sampler
from edgelm.errors import ConfigError, ContextOverflow
from edgelm.options import sampling_of
from edgelm.text.stops import StopMatcher
from edgelm.usage import Sample

if TYPE_CHECKING:
    from edgelm.engine.generate import Conversation
    from edgelm.model import Model
    from edgelm.options import Options

_ALLOWED = ("max_tokens", "stop", "ignore_eos", "processors")


def together(model: Model, conversation: Conversation, ids: Sequence[int], n: int, options: Options) -> list[Sample]:
    """Return `n` answers, the likeliest first."""
    if n < 1:
        raise ConfigError(f"n must be at least 1, got {n}")
    given: dict[str, Any] = dict(options)
    own = {name: given.pop(name) for name in _ALLOWED if name in given}
    seed = given.pop("seed", None)
    sampling = [sampling_of(given | {"seed": None if seed is None else seed + i}) for i in range(n)]
    context = model.plan.context
    if len(ids) + n > context:
        raise ContextOverflow(len(ids) + n, context)
    samplers = [Watched(make_sampler(one, tuple(own.get("processors", ()))), 0) for one in sampling]
    ends = frozenset[int]() if own.get("ignore_eos") else model.tokenizer.eos_ids
    most = min(own.get("max_tokens") or context, (context - len(ids)) // n + 1)
    turn = model.turns.ask()
    with model.turns.held(turn, None):
        conversation.prefill(ids, lambda _: model.turns.breathe(turn))
        found = answers(conversation, ids, samplers, most, ends, lambda: model.turns.breathe(turn))
    stop = own.get("stop", ())
    made = []
    for answer, one in zip(found, sampling, strict=True):
        matcher = StopMatcher([stop] if isinstance(stop, str) else stop)
        text = matcher.feed(model.tokenizer.decode(answer.ids))
        text += "" if matcher.stopped is not None else matcher.flush()
        assert answer.reason is not None
        reason = "stop" if matcher.stopped is not None else answer.reason
        mean = answer.logprob / max(len(answer.ids) + (answer.reason == "stop"), 1)
        made.append(Sample(text, tuple(answer.ids), mean, reason, one.seed))
    return sorted(made, key=lambda sample: -sample.mean_logprob)
