"""What texts of ids have in common."""

from __future__ import annotations

from collections.abc import Sequence


def n_common(one: Sequence[int], other: Sequence[int]) -> int:
    """Return how many ids both texts begin with."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (ours, theirs) in pairs if ours != theirs), min(len(one), len(other)))
