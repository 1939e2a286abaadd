"""How long a pass takes when units are computed in order while others are read ahead into a few slots.

Pure arithmetic on seconds: a flash that serves one read after the other, and one thread of computing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

_ROUNDS = 3  # passes until the beginning, with its full slots, no longer matters


class Rates(NamedTuple):
    """What the device was measured to do, in bytes of weights a second.

    `flash_bytes_per_s`: reads. `compute_bytes_per_s`: kernels in a pass of one token, `wide_bytes_per_s`: bytes times
    tokens in a wide pass (0: not measured). `pass_overhead_s`: what a pass of one token takes beside its weights,
    `token_overhead_s`: what each token of a wide one takes. `read_cost_s_per_byte`: how long computing is held up by
    every byte that is read meanwhile.
    """

    flash_bytes_per_s: float
    compute_bytes_per_s: float
    pass_overhead_s: float = 0.0
    wide_bytes_per_s: float = 0.0
    token_overhead_s: float = 0.0
    read_cost_s_per_byte: float = 0.0
    simulated: str | None = None
    """The device whose flash it is, if not this one's."""
    published: bool = False
    """Whether these are figures that others published of that device: nothing of it was measured here."""
    steady: bool = True
    """Whether repeated measurements agreed; if not, the machine was busy, and another time would say something else."""

    def compute_s(self, n_bytes: int, n_tokens: int = 1) -> float:
        """Return the seconds that `n_tokens` take with weights of `n_bytes`, overhead apart."""
        one = n_bytes / self.compute_bytes_per_s
        if n_tokens == 1:
            return one
        return max(one, n_tokens * n_bytes / self.wide_bytes_per_s) if self.wide_bytes_per_s else one * n_tokens

    def overhead_s(self, n_tokens: int) -> float:
        """Return what a pass of `n_tokens` takes beside its weights."""
        return max(self.pass_overhead_s, n_tokens * self.token_overhead_s)


def pass_s(compute_s: Sequence[float], read_s: Sequence[float], n_slots: int) -> float:
    """Return the seconds of a pass in the middle of many.

    Unit i computes for `compute_s[i]` once it is there; `read_s[i]` is how long its read takes, 0 if it stays in
    memory. A read begins when the read before is done and one of `n_slots` is free; reads go on round the end.
    """
    if not any(read_s):
        return sum(compute_s)
    freed = deque([0.0] * n_slots)  # when each slot, in order of use, is free again
    read_done = computed = began = 0.0
    for _ in range(_ROUNDS):
        began = computed
        for compute, read in zip(compute_s, read_s, strict=True):
            if read:
                read_done = max(read_done, freed.popleft()) + read
                computed = max(computed, read_done)
            computed += compute
            if read:
                freed.append(computed)
    return computed - began
