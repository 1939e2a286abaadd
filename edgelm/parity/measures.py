"""Two sets of logits for the same positions, compared. Knows arrays only."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Exact = NDArray[np.float64]


class BadLogits(ValueError):
    """Logits that cannot be compared."""


class Likelihood:
    """How likely a text was, token by token."""

    def __init__(self) -> None:
        self._n, self._nll = 0, 0.0

    def add(self, log_probabilities: Exact, next_id: int | None) -> None:
        """Count the token that followed, if it is known."""
        if next_id is not None:
            self._n += 1
            self._nll -= float(log_probabilities[next_id])

    @property
    def perplexity(self) -> float | None:
        """The exponential of the mean negative log-likelihood; None if nothing was counted."""
        return math.exp(min(self._nll / self._n, 700.0)) if self._n else None


class Comparison:
    """What came of every position that was added. Row by row in float64, so that little memory is needed.

    `likelihood` is that of the text to the other one, not to the reference.
    """

    def __init__(self) -> None:
        self.n = self.n_agreeing = 0
        self.largest_kl = self.largest_gap = self.largest_difference = 0.0
        self.first_mismatch: int | None = None
        self.likelihood = Likelihood()
        self._kl = 0.0

    def add(self, reference: Floats, other: Floats, next_ids: Sequence[int] = ()) -> None:
        """Compare logits [n, n_vocab]; `next_ids` are the tokens that follow, of the first rows.

        Raises `BadLogits` for logits of `other` that are infinite, no numbers, or not as many.
        """
        if reference.shape != other.shape:
            raise BadLogits(f"its logits are {other.shape} where {reference.shape} were expected")
        for i, (ours, theirs) in enumerate(zip(reference, other, strict=True)):
            if not np.isfinite(theirs).all():
                raise BadLogits(f"its logits at position {self.n} are infinite or no numbers")
            self._add_row(ours, theirs, next_ids[i] if i < len(next_ids) else None)

    def _add_row(self, ours: Floats, theirs: Floats, next_id: int | None) -> None:
        p, q = log_softmax(ours), log_softmax(theirs)
        best, choice = int(ours.argmax()), int(theirs.argmax())
        if best == choice:
            self.n_agreeing += 1
        else:
            gap = max(float(ours[best] - ours[choice]), float(theirs[choice] - theirs[best]))
            self.largest_gap = max(self.largest_gap, gap)
            if self.first_mismatch is None:
                self.first_mismatch = self.n
        kl = max(float(np.exp(p) @ (p - q)), 0.0)  # rounding may leave a little less than nothing
        self._kl += kl
        self.largest_kl = max(self.largest_kl, kl)
        self.largest_difference = max(self.largest_difference, float(np.abs(ours - theirs).max()))
        self.likelihood.add(q, next_id)
        self.n += 1

    @property
    def mean_kl(self) -> float:
        """Mean of KL(reference || other) in nats."""
        return self._kl / max(self.n, 1)

    @property
    def agreement(self) -> float:
        """Share of positions at which both have the same likeliest token."""
        return self.n_agreeing / max(self.n, 1)


def log_softmax(logits: Floats) -> Exact:
    """Return the logarithms of the probabilities of one row of logits."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max()
    return np.asarray(shifted - math.log(np.exp(shifted).sum()))


def nmse(ours: NDArray[np.floating], expected: NDArray[np.floating]) -> float:
    """Normalized mean squared error, as in llama.cpp's test-backend-ops; not a number where `ours` is none."""
    exact = expected.astype(np.float64)
    return float(np.square(ours - exact).sum() / max(float(np.square(exact).sum()), 1e-30))
