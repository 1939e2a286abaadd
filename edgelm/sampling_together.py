"""Several answers to one prompt at a time, as `Model.samples` gives them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from edgelm.engine.logprobs import Watched
from edgelm.engine.samples import Answer, answers, longest
from edgelm.errors import Cancelled, ConfigError
from edgelm.text.stops import StopMatcher
from edgelm.usage import Sample

if TYPE_CHECKING:
    from edgelm.engine.generate import Conversation
    from edgelm.model import Model
    from edgelm.options import Options


def together(model: Model, conversation: Conversation, ids: Sequence[int], n: int, options: Options) -> list[Sample]:
    """Return `n` answers, the likeliest first."""
    if n < 1:
        raise ConfigError(f"n must be at least 1, got {n}")
    if options.get("logprobs") is not None:
        raise ConfigError("samples have their mean log-probability; logprobs of each token are what `stream` gives")
    if not ids:
        raise ConfigError("the prompt is empty; give it at least one token")
    seed = options.get("seed")
    seeds = [None if seed is None else seed + i for i in range(n)]
    if n == 1:
        return [_alone(model, ids, options)]
    if model.plan.approximate:
        raise ConfigError("approximate attention gives one answer at a time; ask for one, or load the model without it")
    made = [model.sampling(_with(options, "seed", seed)) for seed in seeds]
    stop, timeout_s = options.get("stop", ()), options.get("timeout_s")
    texts = [_Text(model, [stop] if isinstance(stop, str) else tuple(stop)) for _ in range(n)]
    most = longest(conversation.engine, len(ids), n, options.get("max_tokens"))
    samplers = [Watched(make(len(ids), most), 0) for make, _ in made]
    turn = model.turns.ask()
    found = [Answer(reason="cancelled") for _ in range(n)]
    try:
        with model.turns.held(turn, timeout_s):
            conversation.prefill(ids, lambda _: model.turns.breathe(turn))
            found = answers(
                conversation, ids, samplers, most, made[0][1],
                breathe=lambda: model.turns.breathe(turn), is_over=lambda i, token: texts[i].feed(token),
            )  # fmt: skip
    except Cancelled:
        pass
    samples = []
    for answer, text, seed, sampler in zip(found, texts, seeds, samplers, strict=True):
        reason = (turn.stopped or "cancelled") if answer.reason == "cancelled" else answer.reason
        assert reason is not None
        closed = reason == "stop" and sampler.closed
        samples.append(Sample(text.whole(), tuple(answer.ids), answer.mean_logprob, reason, seed, closed))
    return sorted(samples, key=lambda sample: -sample.mean_logprob)


def _alone(model: Model, ids: Sequence[int], options: Options) -> Sample:
    """Return one answer, as a stream gives it: with guesses verified, whatever computes."""
    chunks = list(model.stream_ids(ids, **_with(options, "logprobs", 0)))
    noted = [chunk.logprobs.logprob for chunk in chunks if chunk.logprobs is not None]
    reason = chunks[-1].finish_reason
    assert reason is not None
    tokens = tuple(chunk.token_id for chunk in chunks if chunk.token_id is not None)
    mean = sum(noted) / max(len(noted), 1)
    text, closed = "".join(chunk.text for chunk in chunks), chunks[-1].closed
    return Sample(text, tokens, mean, reason, options.get("seed"), closed)


def _with(options: Options, name: str, value: int | None) -> Options:
    changed = options.copy()
    changed[name] = value  # type: ignore[literal-required]
    return changed


class _Text:
    """The text of one answer, up to a stop string."""

    def __init__(self, model: Model, stops: Sequence[str]) -> None:
        self._matcher, self._decoder = StopMatcher(stops), model.tokenizer.incremental()
        self._pieces: list[str] = []

    def feed(self, token: int) -> bool:
        """Say whether it is over with this token."""
        self._pieces.append(self._matcher.feed(self._decoder.feed(token)))
        return self._matcher.stopped is not None

    def whole(self) -> str:
        return "".join(self._pieces) + self._matcher.feed(self._decoder.flush()) + self._matcher.flush()
