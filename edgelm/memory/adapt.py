"""Decide when a running model gives memory back to a device that runs short, and when it takes memory again.

Pure: knows samples and budgets; no clock, no thread, no system. One sample comes every `SAMPLE_S` seconds.
"""

from __future__ import annotations

from edgelm.memory.platform.base import Pressure
from edgelm.sizes import MB

SAMPLE_S = 0.5
"""Often enough to be ahead of programs that load their data from a disk; costs less than a thousandth of a core."""
MARGIN_SHARE = 0.05
"""Share of the memory that stays free: systems reclaim at 1 to 2 %, and daemons that kill begin at about 5 %."""
MIN_MARGIN_BYTES, SMALL_SHARE, MAX_MARGIN_BYTES = 64 * MB, 0.1, 500 * MB
"""On small devices the margin is what a program may allocate between two samples, but not more than a tenth of all;
on large ones what a system needs to breathe, however large they are."""
TARGET = 1.5
"""Margins to be free after giving back: noise alone shall not ask for the next change."""
ROOM = 2.0
"""Margins that stay free after growing. Above `TARGET`, so that under constant conditions nothing swings."""
MIN_GROWTH = 0.25
"""Smaller steps than this share of the margin are not worth a change of the plan, unless they reach the end."""
FALL = 0.5
"""Margins that must have gone since the last sample before that is taken for a trend and not for noise."""
STALLED = 0.1
"""Share of the time in which tasks waited for memory. A system that reclaims in the background stays below 1 %."""
NEAR = 4.0
"""Margins free above which stalls and met limits are not believed: those are other groups' troubles, or page cache
that fills its group and is dropped again, and giving memory back would cure neither."""
STEPS = 4
"""Memory is taken back in about this many steps, and given back in as many where only signals ask for it."""
PATIENCE = 6
"""Samples between two steps that signals ask for: an average over ten seconds takes as long to show an effect."""
CALM, MAX_CALM = 10, 120
"""Calm samples before each step up; the wait doubles, up to the second, whenever the last step up was too much."""


def margin_bytes(total_bytes: int) -> int:
    """Return how much of a device's or a group's memory should stay free."""
    least = min(MIN_MARGIN_BYTES, int(total_bytes * SMALL_SHARE))
    return min(max(int(total_bytes * MARGIN_SHARE), least), MAX_MARGIN_BYTES)


class Adapter:
    """The policy, and the little it remembers between samples."""

    def __init__(self) -> None:
        self._hits: int | None = None
        self._before: tuple[int, int] | None = None
        self._calm = self._rest = 0
        self._wait = CALM
        self._grew = False

    def next_budget(self, asked: int, floor: int, budget: int, used: int, sample: Pressure) -> int | None:
        """Return the budget to go over to, or None to stay at `budget`, of which the plan takes `used` bytes.

        Never below `floor`, the smallest that works, and never above `asked`.
        """
        margin = margin_bytes(sample.total_bytes)
        ahead = self._ahead(used, sample.available_bytes, margin)
        missing = int(margin * TARGET) - ahead if ahead < margin else 0
        signal = self._signal(sample, margin)
        self._rest = max(self._rest - 1, 0)
        if missing or signal:
            self._calm = 0
            if signal and not self._rest:
                self._rest = PATIENCE
                missing = max(missing, budget if signal > 1 else -(-(asked - floor) // STEPS))
            return self._less(floor, budget, used, missing) if missing else None
        self._calm += 1
        if self._calm < self._wait:
            return None
        return self._more(asked, floor, budget, used, sample.available_bytes - int(margin * ROOM), margin)

    def _ahead(self, used: int, available: int, margin: int) -> int:
        """Return what will be free at the next sample if others go on as since the last one."""
        before, self._before = self._before, (used, available)
        if before is None or before[0] != used:
            return available  # the difference is our own doing
        fall = before[1] - available
        return available - fall if fall > margin * FALL else available

    def _signal(self, sample: Pressure, margin: int) -> int:
        """Return 1 if something but the free bytes says that memory is short, 2 if it is critical, else 0."""
        met = self._hits is not None and sample.limit_hits > self._hits
        self._hits = sample.limit_hits
        near = sample.available_bytes < NEAR * margin
        return max(sample.level, int(near and (met or sample.stalled >= STALLED)))

    def _less(self, floor: int, budget: int, used: int, missing: int) -> int | None:
        # what the plan leaves unused frees nothing, so the step counts from what is used
        wanted = max(min(used, budget) - missing, floor)
        if wanted >= budget:
            return None
        if self._grew:
            self._wait = min(self._wait * 2, MAX_CALM)
        self._grew = False
        return wanted

    def _more(self, asked: int, floor: int, budget: int, used: int, room: int, margin: int) -> int | None:
        if budget >= asked:
            self._grew, self._wait = False, CALM  # it went well
            return None
        least = int(margin * MIN_GROWTH)
        step = max((asked - floor) // STEPS, least)
        wanted = min(asked, budget + step, used + room)
        if wanted <= budget or wanted < min(asked, budget + least):
            return None
        self._calm, self._grew = 0, True
        return wanted
