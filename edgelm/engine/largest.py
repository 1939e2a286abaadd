"""The largest of many numbers, without sorting or copying all of them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

BLOCK = 512
"""262,144 logits make 512 blocks: both levels of a two-level search are equally short."""


def largest(values: NDArray[np.float32], k: int) -> NDArray[np.int64]:
    """Return the positions of the `k` largest values, largest first, the lower position first among equals."""
    n_blocks = len(values) // BLOCK
    if n_blocks > k:
        # k blocks have a maximum of at least `bound`, so the k largest values have, too: nearly all others
        # are gone after one pass, without partitioning (and copying) the whole vocabulary
        maxima = values[: n_blocks * BLOCK].reshape(n_blocks, BLOCK).max(axis=1)
        bound = np.partition(maxima, n_blocks - k)[n_blocks - k]
        positions = np.flatnonzero(values >= bound)
    else:
        bound = np.partition(values, len(values) - k)[len(values) - k]
        positions = np.flatnonzero(values >= bound)
    order = np.argsort(-values[positions], kind="stable")
    return positions[order[:k]]
