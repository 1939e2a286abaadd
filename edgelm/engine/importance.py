"""How many places of a bounded cache each layer gets. Knows numbers only.

Layers differ in how much of their attention lies on few tokens. One share of the attention, the same for all layers and
found by bisection, says how many tokens each of them keeps (PrefixKV, arXiv:2412.03409).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_STEPS = 50


def sizes_of(ranks: Sequence[NDArray[np.float32]], total: int, least: int) -> list[int]:
    """Return how many of its n places each layer keeps: `total` together (or all), at least `least` each.

    `ranks`: of each layer, how much attention each place gets, float32 [n]. Raises `ValueError` if `total` is too
    small for `least`.
    """
    n, n_layers = len(ranks[0]), len(ranks)
    if total >= n * n_layers:
        return [n] * n_layers
    room = total - least * n_layers
    if room < 0:
        raise ValueError(f"{total} places are too few for {least} in each of {n_layers} layers")
    before = []
    for one in ranks:
        falling = np.sort(one.astype(np.float64))[::-1]
        before.append(np.append(0.0, np.cumsum(falling[:-1])) / falling.sum())

    def kept(share: float) -> list[int]:
        return [min(int(np.searchsorted(one, share)), n - least) for one in before]

    low, high = 0.0, 2.0  # above 1, so that places without any attention count, too
    for _ in range(_STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(kept(middle)) <= room else (low, middle)
    sizes = []
    left = room - sum(kept(low))
    for size, more in zip(kept(low), kept(high), strict=True):  # places of equal attention cross the share together
        added = min(more - size, left)
        sizes.append(least + size + added)
        left -= added
    return sizes
