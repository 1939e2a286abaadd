"""How many threads compute a pass whose weights stream.

Kernels spin while they wait for each other, and readers need a core: where flash is slower than computing, one thread
fewer costs nothing and saves a core's power; where computing is slower, every thread counts; and on some systems
spinning threads hold readers up. Which it is shows in the passes themselves: both ways are tried now and then, and the
faster is kept. Passes that verify guesses go the way of those of one token: kernels that spin while they share their
cores with readers took up to a hundred times as long on a busy machine. Where other processes want the same cores, two
programs that spin for each other make passes of 8 ms last for 3 s: then one thread alone computes, which waits for
nobody. Knows seconds, no engine.
"""

from __future__ import annotations

WIDE_TOKENS = 33
"""Passes of at least this many tokens read a prompt, and are bound by compute even where weights stream."""
FIRST_TRIAL, LAST_TRIAL = 16, 256
"""Passes until the other way is tried again: twice as many each time that it loses."""
_WORTH = 0.97
_FRESH = 0.4
CROWDED, ALARMS = 6.0, 2
"""How many times as long as it can a pass takes where others want the cores, and how often in a row it must."""
FIRST_REST, LAST_REST = 16, 256
"""Passes on one thread before all are tried again: twice as many each time that it is too early."""


class Crowd:
    """Notices that other processes want the cores, by passes that take many times as long as they can.

    Then one thread computes for a while. Whether all are faster again shows in the next pass, and what that takes is
    usual from then on: a longer context has slower passes, too.
    """

    def __init__(self) -> None:
        self._least_s: dict[int, float] = {}
        self._alone_s: dict[int, float] = {}
        self._alarms, self._n_left, self._rest = 0, 0, FIRST_REST

    @property
    def there(self) -> bool:
        """Whether one thread had better compute alone."""
        return self._n_left > 0

    def passed(self, n_tokens: int, seconds: float) -> None:
        """Learn from a pass. Those of prompts are compared by what a token took."""
        width, took_s = (n_tokens, seconds) if n_tokens < WIDE_TOKENS else (WIDE_TOKENS, seconds / n_tokens)
        if self._n_left:
            self._n_left -= 1
            self._alone_s[width] = took_s
            return
        if (alone_s := self._alone_s.pop(width, None)) is not None:
            if took_s > alone_s:
                self._begin_rest()
            else:
                self._least_s[width] = took_s
            return
        least_s = self._least_s.setdefault(width, took_s)
        self._least_s[width] = min(least_s, took_s)
        if took_s <= CROWDED * least_s:
            self._alarms, self._rest = 0, max(self._rest - 1, FIRST_REST)
            return
        self._alarms += 1
        if self._alarms == ALARMS:
            self._begin_rest()

    def _begin_rest(self) -> None:
        self._alarms, self._n_left = 0, self._rest
        self._rest = min(2 * self._rest, LAST_REST)


class Pace:
    """Decides for one plan. `threads` before every pass, `passed` after it."""

    def __init__(self, n_threads: int, streams: bool, tries: bool = True) -> None:
        """`tries`: whether the other way is tried; else narrow passes take one thread fewer where weights stream."""
        self._all, self._tries = n_threads, tries
        self._few = max(1, n_threads - 1) if streams else n_threads
        self._usual_s: dict[int, float] = {}
        self._chosen, self._trial, self._n_left = self._few, FIRST_TRIAL, 2
        self._crowd = Crowd()

    def threads(self, n_tokens: int) -> int:
        if self._crowd.there:
            return 1
        if n_tokens == 1 and self._n_left == 0:
            return self._other
        return self._all if n_tokens >= WIDE_TOKENS else self._chosen

    def passed(self, n_tokens: int, seconds: float) -> None:
        """Learn from the pass that `threads` was asked for last."""
        alone = self._crowd.there
        self._crowd.passed(n_tokens, seconds)
        if alone or n_tokens != 1 or self._few == self._all or not self._tries:
            return
        if self._n_left:
            self._n_left -= 1
            before = self._usual_s.get(self._chosen, seconds)
            self._usual_s[self._chosen] = before + _FRESH * (seconds - before)
            return
        self._usual_s[self._other] = seconds  # what it took long ago says little
        few_s, all_s = (self._usual_s[n] for n in (self._few, self._all))
        better = self._all if all_s < _WORTH * few_s else self._few
        self._trial = FIRST_TRIAL if better != self._chosen else min(2 * self._trial, LAST_TRIAL)
        self._chosen, self._n_left = better, self._trial

    @property
    def _other(self) -> int:
        return self._all if self._chosen == self._few else self._few
