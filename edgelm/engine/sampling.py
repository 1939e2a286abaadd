"""From one row of logits to one token id. Knows nothing of models, text or how the logits came about.

A sampler is a plain callable made by `make_sampler`. The steps and their order are those of llama.cpp's
default chain: logit bias, penalties, DRY, top-n-sigma, top-k, typical, top-p, min-p, XTC, temperature, draw.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from edgelm.engine.largest import BLOCK, largest
from edgelm.engine.sampling_steps import Mirostat, dry_penalties, dynamic_temperature, within_sigma, without_top_choices
from edgelm.errors import ConfigError, EdgeLMError

Logits = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]
Processor = Callable[[Sequence[int], Logits], Logits]
"""(history, logits) -> logits of the same shape; it may write to the array it is given."""
Sampler = Callable[[Logits, Sequence[int]], int]


LEAST_TEMPERATURE = 1e-6
"""Temperatures below this, but for 0, count as this: the likeliest token, and nothing that float32 cannot divide by."""
LARGEST = 1e9
"""No parameter is larger, so that no step leaves the range of float32."""


class BadLogits(EdgeLMError):
    """The logits hold no number to choose by: a damaged model, or a processor that forbade every token."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How to choose the next token. Greedy unless `temperature` is above 0; the rest are llama.cpp's defaults.

    `top_k` 0, `top_p` 1, `min_p` 0, `typical_p` 1, `repeat_penalty` 1 and the two other penalties 0 switch
    a step off. Penalties look at the last `penalty_last_n` tokens of prompt and answer (-1: at all of them).
    DRY subtracts `dry_multiplier * dry_base ** (n - dry_allowed_length)` from a token that would repeat more than
    `dry_allowed_length` tokens of the last `dry_penalty_last_n`; ids of `dry_breakers` end a repetition. `top_n_sigma`
    keeps what is at most so many standard deviations below the best. XTC excludes, with `xtc_probability`, all but the
    least likely of the tokens above `xtc_threshold`. `dynatemp_range` lets the temperature follow the entropy. With a
    `mirostat_tau`, mirostat 2.0 takes the place of every truncation. Multiplier, sigma, probability, range and tau of 0
    switch a step off. Nothing may lie beyond ±1e9.
    `seed` None draws differently each time. Raises `ConfigError` for a value that cannot work.
    """

    temperature: float = 0.0
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    typical_p: float = 1.0
    repeat_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    penalty_last_n: int = 64
    dry_multiplier: float = 0.0
    dry_base: float = 1.75
    dry_allowed_length: int = 2
    dry_penalty_last_n: int = -1
    dry_breakers: frozenset[int] = frozenset()
    top_n_sigma: float = 0.0
    xtc_probability: float = 0.0
    xtc_threshold: float = 0.1
    dynatemp_range: float = 0.0
    dynatemp_exponent: float = 1.0
    mirostat_tau: float = 0.0
    mirostat_eta: float = 0.1
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)
    seed: int | None = None

    def __post_init__(self) -> None:
        _check("temperature", self.temperature, 0.0, LARGEST)
        _check("top_p", self.top_p, 0.0, 1.0)
        _check("min_p", self.min_p, 0.0, 1.0)
        _check("typical_p", self.typical_p, 0.0, 1.0)
        _check("repeat_penalty", self.repeat_penalty, 1 / LARGEST, LARGEST)
        _check("presence_penalty", self.presence_penalty, -LARGEST, LARGEST)
        _check("frequency_penalty", self.frequency_penalty, -LARGEST, LARGEST)
        _check("dry_multiplier", self.dry_multiplier, 0.0, LARGEST)
        _check("dry_base", self.dry_base, 1.0, LARGEST)
        _check("top_n_sigma", self.top_n_sigma, 0.0, LARGEST)
        _check("xtc_probability", self.xtc_probability, 0.0, 1.0)
        _check("xtc_threshold", self.xtc_threshold, 0.0, 1.0)
        _check("dynatemp_range", self.dynatemp_range, 0.0, LARGEST)
        _check("dynatemp_exponent", self.dynatemp_exponent, 0.0, LARGEST)
        _check("mirostat_tau", self.mirostat_tau, 0.0, LARGEST)
        _check("mirostat_eta", self.mirostat_eta, 0.0, 1.0)
        _check_int("dry_allowed_length", self.dry_allowed_length, 1)
        _check_int("dry_penalty_last_n", self.dry_penalty_last_n, -1)
        _check_int("top_k", self.top_k, 0)
        _check_int("penalty_last_n", self.penalty_last_n, -1)
        if self.seed is not None:
            _check_int("seed", self.seed, 0)
        for token, bias in self.logit_bias.items():
            _check_int("a token id in logit_bias", token, 0)
            if bias != -math.inf:  # which forbids a token
                _check(f"logit_bias of token {token}", bias, -LARGEST, LARGEST)
        object.__setattr__(self, "logit_bias", dict(self.logit_bias))

    @property
    def penalizes(self) -> bool:
        """Whether any penalty changes the logits."""
        return self.penalty_last_n != 0 and (
            self.repeat_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0
        )


def _check(name: str, value: float, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < math.inf:
        raise ConfigError(f"{name} must be a finite number, got {value!r}")
    if not low <= value <= high:
        raise ConfigError(f"{name} must be between {low:g} and {high:g}, got {value!r:.40}")


def _check_int(name: str, value: int, low: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise ConfigError(f"{name} must be a whole number of {low} or more, got {value!r}")


def make_sampler(sampling: Sampling | None = None, processors: Sequence[Processor] = ()) -> Sampler:
    """Return `sample(logits, history) -> token id` for one sequence; the same seed gives the same tokens.

    `logits` is a float32 row of (n_vocab,) and is used up: bias, penalties and processors may write to it.
    `history` holds the ids of the prompt and of the answer so far. Processors run after the penalties, so
    that what they forbid stays forbidden. `sample` raises `BadLogits` for NaN or when no token is left,
    `ConfigError` for a bias outside the vocabulary.
    """
    sampling = sampling or Sampling()
    processors = tuple(processors)
    if sampling.temperature == 0:

        def greedy(logits: Logits, history: Sequence[int]) -> int:
            return _best(_processed(logits, history, sampling, processors))[0]

        return greedy

    import random  # not NumPy's, whose loading would cost megabytes of the budget; and greedy needs neither

    rng = random.Random(sampling.seed)
    mirostat = Mirostat(sampling.mirostat_tau, sampling.mirostat_eta) if sampling.mirostat_tau else None

    def draw(logits: Logits, history: Sequence[int]) -> int:
        logits = _processed(logits, history, sampling, processors)
        _, highest = _best(logits)
        if highest == math.inf:
            raise BadLogits("a logit is infinite, so no probability can be computed; check the logits processors")
        if mirostat is not None:
            return mirostat.draw(logits / np.float32(_temperature(logits, sampling)), rng.random())
        ids, kept = _truncated(logits, highest, sampling)
        if sampling.xtc_probability and rng.random() < sampling.xtc_probability:
            left = without_top_choices(kept, sampling.xtc_threshold)
            if left is not None:
                ids, kept = (left if ids is None else ids[left]), kept[left]
                highest = float(kept.max())
        chosen = _draw(kept, highest, _temperature(kept, sampling), rng.random())
        return chosen if ids is None else int(ids[chosen])

    return draw


def _processed(logits: Logits, history: Sequence[int], sampling: Sampling, processors: tuple[Processor, ...]) -> Logits:
    if (sampling.logit_bias or sampling.penalizes or sampling.dry_multiplier) and not logits.flags.writeable:
        logits = logits.copy()
    for token, bias in sampling.logit_bias.items():
        if token >= len(logits):
            raise ConfigError(f"logit_bias names token {token}, but the vocabulary ends at {len(logits) - 1}")
        logits[token] += bias
    if sampling.penalizes:
        _penalize(logits, history, sampling)
    if sampling.dry_multiplier:
        last = sampling.dry_penalty_last_n
        penalties = dry_penalties(
            history if last < 0 else history[len(history) - min(last, len(history)) :], sampling.dry_multiplier,
            sampling.dry_base, sampling.dry_allowed_length, sampling.dry_breakers,
        )  # fmt: skip
        for token, penalty in penalties.items():
            logits[token] -= min(penalty, LARGEST)
    for processor in processors:
        n_vocab, logits = len(logits), processor(history, logits)
        if not isinstance(logits, np.ndarray) or logits.shape != (n_vocab,):
            raise ConfigError(f"a logits processor must return an array of shape ({n_vocab},)")
    return logits


def _temperature(logits: Logits, sampling: Sampling) -> float:
    temperature, spread = sampling.temperature, sampling.dynatemp_range
    if spread:
        temperature = dynamic_temperature(logits, temperature, spread, sampling.dynatemp_exponent)
    return max(temperature, LEAST_TEMPERATURE)


def _penalize(logits: Logits, history: Sequence[int], sampling: Sampling) -> None:
    recent = history if sampling.penalty_last_n < 0 else history[-sampling.penalty_last_n :]
    if not len(recent):
        return
    ids, counts = np.unique(np.asarray(recent, dtype=np.int64), return_counts=True)
    seen = logits[ids]
    # dividing a negative logit would make its token likelier
    seen = np.where(seen <= 0, seen * sampling.repeat_penalty, seen / sampling.repeat_penalty)
    logits[ids] = seen - (counts * sampling.frequency_penalty + sampling.presence_penalty)


def _best(logits: Logits) -> tuple[int, float]:
    best = int(np.argmax(logits))  # NaN wins in argmax, so one look finds it
    highest = float(logits[best])
    if math.isnan(highest):
        raise BadLogits("the logits hold NaN, so the model's weights or its arithmetic are damaged; pull it again")
    if highest == -math.inf:
        raise BadLogits("every token is forbidden; loosen logit_bias or the logits processors")
    return best, highest


def _truncated(logits: Logits, highest: float, sampling: Sampling) -> tuple[Ids | None, Logits]:
    """Return the ids that may be drawn (None: all of them, in order) and their logits."""
    ids: Ids | None = None
    kept = logits
    if sampling.top_n_sigma:
        ids = within_sigma(kept, sampling.top_n_sigma)
        kept = kept[ids]
    if 0 < sampling.top_k < len(kept):
        chosen = largest(kept, sampling.top_k)
        ids, kept = (chosen if ids is None else ids[chosen]), kept[chosen]
    if sampling.typical_p < 1:
        chosen = _typical(kept, highest, sampling.typical_p)
        ids, kept = (chosen if ids is None else ids[chosen]), kept[chosen]
        highest = float(kept.max())
    if sampling.top_p < 1 or sampling.min_p > 0:
        chosen = _likely(kept, highest, sampling.top_p, sampling.min_p)
        ids, kept = (chosen if ids is None else ids[chosen]), kept[chosen]
    return ids, kept


def _weights(logits: Logits, highest: float, temperature: float = 1.0) -> Logits:
    """Return exp((logits - highest) / temperature): probabilities but for their sum. One temporary."""
    weights = logits - np.float32(highest)
    if temperature != 1:
        weights /= np.float32(temperature)
    np.exp(weights, out=weights)
    return weights


def _typical(logits: Logits, highest: float, p: float) -> Ids:
    weights = _weights(logits, highest)
    total = float(weights.sum(dtype=np.float64))
    surprise = (highest + math.log(total)) - logits  # -log p
    likely = weights > 0
    entropy = float((weights[likely] * surprise[likely]).sum(dtype=np.float64)) / total
    order = np.argsort(np.abs(surprise - np.float32(entropy)), kind="stable")
    reached = np.cumsum(weights[order], dtype=np.float64) > p * total
    return order[: int(reached.argmax()) + 1] if reached.any() else order


def _likely(logits: Logits, highest: float, top_p: float, min_p: float) -> Ids:
    """Return the fewest positions whose probabilities reach `top_p`, less those under `min_p` of the best one.

    Both keep a head of the same order, so the cheaper one goes first and leaves little to sort.
    """
    floor = np.float32(highest + math.log(min_p)) if min_p > 0 else np.float32(-math.inf)
    likely = np.flatnonzero(logits >= floor)
    if top_p == 1:
        return likely
    wanted = top_p * float(_weights(logits, highest).sum(dtype=np.float64))
    weights = _weights(logits[likely], highest)
    k = min(256, len(weights))
    while True:
        order = largest(weights, k)
        reached = np.cumsum(weights[order], dtype=np.float64) >= wanted
        if reached.any():
            return likely[order[: int(reached.argmax()) + 1]]
        if k == len(weights):
            return likely
        k = min(k * 8, len(weights))


def _draw(logits: Logits, highest: float, temperature: float, uniform: float) -> int:
    """Return a position, drawn in proportion to the softmax of `logits / temperature`."""
    weights = _weights(logits, highest, temperature)
    n_blocks, first = len(weights) // BLOCK, 0
    if n_blocks > 1:
        # sums of blocks first: a running sum over the vocabulary would be a second temporary of 8 bytes each
        sums = weights[: n_blocks * BLOCK].reshape(n_blocks, BLOCK).sum(axis=1)
        running = np.cumsum(np.append(sums, weights[n_blocks * BLOCK :].sum()), dtype=np.float64)
        block = _position(running, uniform * float(running[-1]))
        # what is left of the uniform number, stretched over the block
        below, above = (float(running[block - 1]) if block else 0.0), float(running[block])
        uniform = (uniform * float(running[-1]) - below) / (above - below)
        first = block * BLOCK
        weights = weights[first : first + BLOCK] if block < n_blocks else weights[first:]
    running = np.cumsum(weights, dtype=np.float64)
    return first + _position(running, uniform * float(running[-1]))


def _position(running: npt.NDArray[np.float64], target: float) -> int:
    """Return the first position whose running sum is above `target`; the last that adds anything if none is."""
    at = int(np.searchsorted(running, target, side="right"))
    return at if at < len(running) else int(np.searchsorted(running, running[-1], side="left"))
