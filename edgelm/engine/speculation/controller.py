"""How much to guess before each pass: as much as yields the most tokens a second, often nothing.

SmartSpec's goodput (arXiv:2406.14066): expected tokens of a pass over its expected time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from edgelm.engine.passes import WIDTHS
from edgelm.engine.speculation.curve import Curve

WORTH = 1.03
"""How much faster than no guessing it must promise to be."""
START, EACH, MOST, LEAST = 0.6, 0.005, 1.0, -1.0
"""Plain passes that guessing may lose to begin with, for each token more, and at the most after having won; and how far
it may be behind, so that it comes back where guesses are nearly sure."""


def goodput(expected: float, n_rows: int, curve: Curve) -> float:
    """Return the tokens a second that a pass of `n_rows` promises which is expected to yield so many."""
    return expected / (curve.seconds(n_rows) * curve.doubt)


class Allowance:
    """What guessing may lose, in plain passes: a little for every token, and what it has won lately.

    So it costs no more than a share of the time, whatever chances and costs were taken to be.
    """

    def __init__(self) -> None:
        self.passes = START

    def add(self, n_tokens: float, passes: float) -> None:
        """Hear that so many tokens took the time of so many plain passes."""
        self.passes = max(min(self.passes + n_tokens * (1 + EACH) - passes, MOST), LEAST)


def nodes_for(reach: Sequence[float], curve: Curve, most_rows: int, allowed: float = math.inf) -> int:
    """Return how many of the likeliest guesses to verify. `reach[i]`: the chance that guess i is reached and right.

    A pass has a row more than guesses, that of the newest token; 0: a plain pass promises as much. `allowed`: plain
    passes that may be lost if guesses come true as their squared chances say, which leaves little of unsure ones.
    """
    plain_s = curve.seconds(1)
    if not plain_s:  # no pass was measured yet
        return 0
    best, best_n = WORTH / plain_s, 0
    expected, bearable, done = 1.0, 1.0 + allowed, 0
    for width in WIDTHS[1:]:
        n = width - 1
        if width > most_rows or n > len(reach):
            break
        for chance in reach[done:n]:
            expected += chance
            bearable += chance * chance
        done = n
        if curve.seconds(width) > bearable * plain_s:
            continue
        promised = goodput(expected, width, curve)
        if promised > best:
            best, best_n = promised, n
    return best_n
