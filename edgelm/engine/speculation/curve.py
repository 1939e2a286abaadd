"""What a pass over n tokens costs, of one model, backend and budget: foretold by the plan, then measured."""

from __future__ import annotations

from collections import deque
from statistics import median

from edgelm.engine.passes import WIDTHS
from edgelm.memory.plan import Plan

_KEPT_PLAIN, _KEPT = 3, 7
"""Passes of one row, and of each other width, that are remembered: how fast the machine is may change any time."""
UNKNOWN = 0.2
"""What each more row costs, as a share of a pass of one, where nothing was measured beforehand."""
DOUBT = 2.0
"""How many times as much guesses must promise where all weights stay, until a wide pass was measured."""


class Curve:
    """T(n), in seconds: what a pass of one takes now, times how much dearer wider ones are."""

    def __init__(self, plan: Plan) -> None:
        one = plan.pass_s(1)
        self._foretold = {n: plan.pass_s(n) / one if one else 1 + UNKNOWN * (n - 1) for n in WIDTHS}
        self._doubt = 1.0 if plan.streamed else DOUBT
        self._one_s = one
        self._seen: dict[int, deque[float]] = {1: deque(maxlen=_KEPT_PLAIN)}
        self._factor: dict[int, float] = {1: 1.0}
        self._begun: set[int] = set()
        self._times: dict[int, float] = {}
        self._compare()

    def _compare(self) -> None:
        """Put together how much dearer each width is: measured, or foretold and corrected by what was."""
        known = [n for n in self._factor if n > 1]
        for width, foretold in self._foretold.items():
            nearest = min(known, key=lambda n: abs(n - width), default=None)
            wrong = self._factor[nearest] / self._foretold[nearest] if nearest else 1.0
            self._times[width] = self._factor.get(width, foretold * max(wrong, 1.0))

    def seconds(self, width: int) -> float:
        """Return what a pass of `width` rows is expected to take, one of `WIDTHS`."""
        return self._times[width] * self._one_s

    @property
    def doubt(self) -> float:
        """How many times as much as a plain pass guesses must promise, since nothing is known of wide passes."""
        return self._doubt if len(self._factor) == 1 else 1.0

    def passed(self, width: int, seconds: float) -> None:
        """Learn from a pass; the first one of a width was compiled, too."""
        if width not in self._begun:
            self._begun.add(width)
            return
        seen = self._seen.setdefault(width, deque(maxlen=_KEPT))
        if width == 1:
            seen.append(seconds)
            self._one_s = median(seen)
        elif self._one_s:
            seen.append(seconds / self._one_s)
            self._factor[width] = median(seen)
            self._compare()
