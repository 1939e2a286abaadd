"""The order of candidates for a model, and a sentence for each: pure arithmetic on what is known of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from edgelm.engine.health import ORACLE, Verdict
from edgelm.engine.weighed import Weighed

EQUAL = 0.95
EQUAL_IF_BUSY = 1 / 3
"""Share of the best speed from which a candidate counts as equally fast; the latter where the machine was too busy."""


class Seen(NamedTuple):
    """A candidate on its way. `why_not` is set once it is out."""

    name: str
    verdict: Verdict
    simulated: bool = False
    why_not: str = ""
    broken: bool = False
    weighed: Weighed | None = None

    @property
    def fits(self) -> bool:
        return not self.why_not and not (self.weighed and self.weighed.needed_bytes)


def rank_of(seen: Sequence[Seen]) -> Callable[[Seen], tuple[float, ...]]:
    """Return the key to sort by: what is out last, simulated ones before, then the oracle, inexact ones, by speed."""
    order = {one.name: i for i, one in enumerate(seen)}
    fastest = _fastest(seen)
    equal = EQUAL if all(one.weighed.steady for one in seen if one.weighed) else EQUAL_IF_BUSY

    def key(one: Seen) -> tuple[float, ...]:
        weighed, place = one.weighed or Weighed(), order[one.name]
        speed = -math.inf if weighed.decode_tps >= equal * fastest[_class(one)] else -weighed.decode_tps
        return (bool(one.why_not), one.simulated, weighed.needed_bytes, _class(one), speed, place)

    return key


def _class(one: Seen) -> int:
    return 2 if one.name == ORACLE else 1 if one.weighed and one.weighed.loss else 0


def _fastest(seen: Sequence[Seen]) -> dict[int, float]:
    found = {0: 0.0, 1: 0.0, 2: 0.0}
    for one in seen:
        if one.fits and not one.simulated and one.weighed:
            found[_class(one)] = max(found[_class(one)], one.weighed.decode_tps)
    return found


def reasons_of(ranked: Sequence[Seen]) -> dict[str, str]:
    """Return for each candidate why it was chosen or passed over."""
    best = ranked[0]
    chosen = best.fits and not best.simulated
    said = {one.name: f"passed over, {_why_over(one, best)}" for one in ranked}
    if chosen:
        said[best.name] = f"chosen, {_why(best, ranked[1:])}"
    return said


def _why(best: Seen, others: Sequence[Seen]) -> str:
    rivals = [one for one in others if one.fits and not one.simulated and one.name != ORACLE]
    version = best.verdict.version
    if best.name == ORACLE:
        return f"no faster one works here within the budget ({version})"
    if not rivals:
        return f"the only one beside the reference that works here within the budget ({version})"
    if best.weighed is None:
        return f"the usual first: nothing was measured ({version})"
    speed = f"{best.weighed.decode_tps:.1f} tok/s predicted ({version})"
    equals = [one.weighed.decode_tps for one in rivals if _class(one) == _class(best) and one.weighed]
    if not equals:
        return f"it keeps the model's numbers, {speed}"
    if max(equals) > best.weighed.decode_tps:
        return f"none is faster, as far as could be measured: {speed}"
    return f"the fastest: {speed}"


def _why_over(one: Seen, best: Seen) -> str:
    if one.why_not:
        return one.why_not
    if one.simulated:
        return "it is simulated: taken only when asked for by name"
    if one.weighed and one.weighed.needed_bytes:
        return "the budget is too small for it"
    if one.name == ORACLE:
        return "the reference: taken where no other works"
    if _class(one) > _class(best):
        return f"it loses precision: {one.weighed.loss if one.weighed else ''}"
    if not one.weighed or not best.weighed:
        return "not measured"
    return "slower" if one.weighed.decode_tps < best.weighed.decode_tps else "not faster by more than measuring errs"
