"""What a pass over n tokens costs, of one model, backend and budget: foretold by the plan, then measured."""

from __future__ import annotations

from collections import deque
from statistics import median

from edgelm.engine.passes import WIDTHS
from edgelm.memory.plan import Plan

_KEPT = 7
"""Passes of each width that are remembered."""
UNKNOWN = 0.2
"""What each more row costs, as a share of a pass of one, where nothing was measured beforehand."""
_DOUBT = 2.0
"""How much dearer than foretold wide passes are taken to be where all weights stay, until one was measured."""


class Curve:
    """T(n), in seconds."""

    def __init__(self, plan: Plan) -> None:
        one = plan.pass_s(1)
        self._foretold = {n: plan.pass_s(n) / one if one else 1 + UNKNOWN * (n - 1) for n in WIDTHS}
        self._doubt = 1.0 if plan.streamed else _DOUBT
        self._seen: dict[int, deque[float]] = {}
        self._median: dict[int, float] = {1: one}
        self._begun: set[int] = set()

    def seconds(self, width: int) -> float:
        """Return what a pass of `width` rows is expected to take: measured, or foretold and corrected by what was."""
        measured = self._median.get(width)
        if measured is not None and (width == 1 or width in self._seen):
            return measured
        known = [n for n in self._seen if n > 1]
        if known:
            nearest = min(known, key=lambda n: abs(n - width))
            factor = self._median[nearest] / (self._foretold[nearest] * self._median[1])
        else:
            factor = self._doubt
        return self._foretold[width] * self._median[1] * max(factor, 1.0)

    def passed(self, width: int, seconds: float) -> None:
        """Learn from a pass; the first one of a width was compiled, too."""
        if width not in self._begun:
            self._begun.add(width)
            return
        seen = self._seen.setdefault(width, deque(maxlen=_KEPT))
        seen.append(seconds)
        self._median[width] = median(seen)
