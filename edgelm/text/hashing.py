"""Hash many substrings of a run of bytes at once: 64-bit polynomial hashes from prefix sums.

Equal texts have equal hashes wherever they lie; that two of a million different texts share one has a chance of
10^-8. Knows nothing of what the texts are.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Hashes = npt.NDArray[np.uint64]
Places = npt.NDArray[np.int64]

_BASE = 0x9E3779B97F4A7C15  # odd, so that its powers can be undone modulo 2**64
_UNDO = pow(_BASE, -1, 1 << 64)
# Not from np.random: importing it costs six megabytes.
_WEIGHTS: Hashes = np.array([(byte + 1) * 0xBF58476D1CE4E5B9 % (1 << 61) for byte in range(256)], dtype=np.uint64)
_WEIGHTS ^= _WEIGHTS >> np.uint64(29)
_WEIGHTS *= np.uint64(0x94D049BB133111EB)
_WEIGHTS ^= _WEIGHTS >> np.uint64(32)


class SubstringHashes:
    """Hashes of any substrings of `data`; 40 bytes of memory for each byte of it."""

    def __init__(self, data: npt.NDArray[np.uint8]) -> None:
        self._powers = _powers(_BASE, len(data) + 1)
        self._undo = _powers(_UNDO, len(data) + 1)
        self._sums = np.zeros(len(data) + 1, dtype=np.uint64)
        np.cumsum(_WEIGHTS[data] * self._powers[:-1], out=self._sums[1:])

    def of(self, starts: Places, ends: Places) -> Hashes:
        """Return the hashes of `data[start:end]` for each start and end."""
        hashes: Hashes = (self._sums[ends] - self._sums[starts]) * self._undo[starts]
        return hashes

    def joined(self, left: Hashes, right: Hashes, n_left: Places) -> Hashes:
        """Return the hashes of the texts of `left`, each `n_left` bytes long, followed by those of `right`."""
        hashes: Hashes = left + right * self._powers[n_left]
        return hashes


def _powers(base: int, n: int) -> Hashes:
    factors = np.full(n, base, dtype=np.uint64)
    factors[0] = 1
    powers: Any = np.cumprod(factors)
    return powers  # type: ignore[no-any-return]
