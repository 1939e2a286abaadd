"""How often guesses of each kind came true, lately. Pure counting."""

from __future__ import annotations

from collections.abc import Hashable

FRESH = 0.04
"""Weight of the newest outcome once there were many: a change of subject shows within some twenty tokens."""
TRUST = 4.0
"""Outcomes that the first estimate is worth."""


class Chances:
    """Estimates by key. Outcomes fade; a first estimate is given by whoever knows the kind."""

    def __init__(self) -> None:
        self._known: dict[Hashable, tuple[float, float]] = {}

    def of(self, key: Hashable, first: float) -> float:
        """Return the chance of guesses of this kind, `first` if none was ever tried."""
        known = self._known.get(key)
        if known is None:
            self._known[key] = first, TRUST
            return first
        return known[0]

    def learn(self, key: Hashable, came_true: bool) -> None:
        """Count an outcome of a kind that `of` was asked for."""
        chance, n = self._known[key]
        weight = max(1.0 / (n + 1.0), FRESH)
        self._known[key] = chance + weight * (came_true - chance), n + 1.0
