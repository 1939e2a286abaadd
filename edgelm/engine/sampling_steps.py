"""Steps of sampling beyond the usual ones, as llama.cpp defines them: DRY, top-n-sigma, XTC, dynamic temperature,
mirostat. Arrays in, arrays out; who calls them in which order is `sampling`'s business."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

import numpy as np
import numpy.typing as npt

Logits = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]

_LARGEST_EXPONENT = 88.0
"""Powers beyond float32's range would be infinite penalties."""


def dry_penalties(
    history: Sequence[int], multiplier: float, base: float, allowed_length: int, breakers: Collection[int]
) -> dict[int, float]:
    """Return what to subtract from tokens that would go on with a repetition ("don't repeat yourself").

    A token that followed the last `n` tokens before, `n` at least `allowed_length`, loses
    `multiplier * base ** (n - allowed_length)`. Tokens of `breakers` end a repetition.
    """
    n = len(history)
    limit = next((i for i in range(n) if history[n - 1 - i] in breakers), n)
    if limit < allowed_length or n < 2:
        return {}
    ids = np.asarray(history, np.int64)
    ends = np.flatnonzero(ids[:-1] == ids[-1])
    longest: dict[int, int] = {}
    matched = 1
    while len(ends):
        if matched >= allowed_length:
            longest |= dict.fromkeys(ids[ends + 1].tolist(), matched)
        if matched >= limit or matched >= n - 1:
            break
        ends = ends[ends >= matched]
        ends = ends[ids[ends - matched] == ids[n - 1 - matched]]
        matched += 1
    largest = int(_LARGEST_EXPONENT / math.log(base)) if base > 1.000001 else n
    return {
        token: multiplier * base ** min(times - allowed_length, largest)
        for token, times in longest.items()
        if token not in breakers
    }


def within_sigma(logits: Logits, n: float) -> Ids:
    """Return the positions of logits that are at most `n` standard deviations below the largest (arXiv:2411.07641)."""
    finite = logits[logits > -np.inf]
    mean = float(finite.mean(dtype=np.float64))
    deviation = math.sqrt(float(np.square(finite - np.float32(mean), dtype=np.float64).mean()))
    return np.flatnonzero(logits >= np.float32(float(finite.max()) - n * deviation))


def without_top_choices(logits: Logits, threshold: float) -> Ids | None:
    """Return the positions that are left when all but the least likely of the tokens above `threshold` are excluded.

    None if fewer than two have such a probability: nothing is excluded then (XTC).
    """
    weights = np.exp(logits - logits.max())
    probabilities = weights / weights.sum(dtype=np.float64)
    top = np.flatnonzero(probabilities >= threshold)
    if len(top) < 2:
        return None
    least = top[np.lexsort((-top, probabilities[top]))[0]]
    keeps = np.ones(len(logits), bool)
    keeps[top] = False
    keeps[least] = True
    return np.flatnonzero(keeps)


def dynamic_temperature(logits: Logits, temperature: float, spread: float, exponent: float) -> float:
    """Return the temperature within `temperature` ± `spread` that the entropy asks for: high where much is possible."""
    if len(logits) < 2:
        return temperature
    weights = np.exp((logits - logits.max()).astype(np.float64))
    probabilities = weights / weights.sum()
    some = probabilities[probabilities > 0]
    entropy = float(-(some * np.log(some)).sum())
    lowest = max(0.0, temperature - spread)
    return lowest + (temperature + spread - lowest) * math.pow(entropy / math.log(len(logits)), exponent)


class Mirostat:
    """Mirostat 2.0 (arXiv:2007.14966): keeps the surprise of the answer at `tau` bits, learning at the rate `eta`."""

    def __init__(self, tau: float, eta: float) -> None:
        self._tau, self._eta, self._mu = tau, eta, 2 * tau

    def draw(self, logits: Logits, uniform: float) -> int:
        """Return a position, drawn among those that are not too surprising; `uniform` is a number in [0, 1)."""
        order = np.argsort(-logits, kind="stable")
        weights = np.exp((logits[order] - logits[order[0]]).astype(np.float64))
        probabilities = weights / weights.sum()
        with np.errstate(divide="ignore"):
            surprising = -np.log2(probabilities) > self._mu
        n = max(int(surprising.argmax()) if surprising.any() else len(order), 1)
        kept = probabilities[:n] / probabilities[:n].sum()
        at = min(int(np.searchsorted(np.cumsum(kept), uniform, side="right")), n - 1)
        self._mu -= self._eta * (-math.log2(float(kept[at])) - self._tau)
        return int(order[at])
