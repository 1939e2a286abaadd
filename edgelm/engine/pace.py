"""How many threads compute a pass whose weights stream.

Kernels spin while they wait for each other, and readers need a core: where flash is slower than computing, one thread
fewer costs nothing and saves a core's power. Where computing is slower, every thread counts. Which it is shows in the
passes themselves. Knows seconds, no engine.
"""

from __future__ import annotations

WIDE_TOKENS = 8
"""Passes of at least this many tokens are bound by compute even where weights stream."""
_WAITS = 0.1
"""Share of a pass that waits for flash from which on flash is the slower."""


class Pace:
    """Decides for one plan. `threads` before every pass, `passed` after it."""

    def __init__(self, n_threads: int, streams: bool) -> None:
        self._all = n_threads
        self._few = max(1, n_threads - 1) if streams else n_threads
        self._decoding = self._few
        self._few_s = 0.0

    def threads(self, n_tokens: int) -> int:
        if n_tokens == 1:
            return self._decoding
        return self._all if n_tokens >= WIDE_TOKENS else self._few

    def passed(self, n_tokens: int, seconds: float, waited_s: float) -> None:
        """Learn from a pass that took `seconds`, of which `waited_s` went by waiting for flash."""
        if n_tokens != 1 or self._few == self._all:
            return
        if self._decoding == self._few:
            self._few_s = seconds - waited_s
            if waited_s < _WAITS * seconds:
                self._decoding = self._all
        elif seconds > self._few_s:  # fewer would have been done as soon
            self._decoding = self._few
