"""How much to guess before each pass: as much as yields the most tokens a second, often nothing.

SmartSpec's goodput (arXiv:2406.14066): expected tokens of a pass over its expected time.
"""

from __future__ import annotations

from collections.abc import Sequence

from edgelm.engine.passes import WIDTHS
from edgelm.engine.speculation.curve import Curve

WORTH = 1.03
"""How much faster than no guessing it must promise to be."""


def goodput(reach: Sequence[float], n: int, curve: Curve) -> float:
    """Return the tokens a second that a pass promises which verifies the `n` likeliest guesses; see `nodes_for`."""
    return (1.0 + sum(reach[:n])) / curve.seconds(n + 1)


def nodes_for(reach: Sequence[float], curve: Curve, most_rows: int) -> int:
    """Return how many of the likeliest guesses to verify. `reach[i]`: the chance that guess i is reached and right.

    A pass has a row more than guesses, that of the newest token; 0: a plain pass promises as much.
    """
    if not curve.seconds(1):  # no pass was measured yet
        return 0
    best, best_n = WORTH / curve.seconds(1), 0
    for width in WIDTHS[1:]:
        n = width - 1
        if width > most_rows or n > len(reach):
            break
        promised = goodput(reach, n, curve)
        if promised > best:
            best, best_n = promised, n
    return best_n
