"""How much memory this process has now and had at its peak, as the operating system counts it.

Only measures. The peak is that of the whole process and is never reset here: the peak is the promise.
"""

from __future__ import annotations

from typing import NamedTuple

from edgelm.memory.platform import Platform, current_platform


class MemoryUsage(NamedTuple):
    """One sample. `peak_bytes` is the process' largest resident size so far, `anon_bytes` what no file backs."""

    rss_bytes: int
    peak_bytes: int
    anon_bytes: int
    file_bytes: int


class Meter:
    """Samples of one process. `start` is the sample taken when the meter was made, before a model is loaded."""

    __slots__ = ("_highest_bytes", "_platform", "start")

    def __init__(self, platform: Platform | None = None) -> None:
        self._platform = platform or current_platform()
        self._highest_bytes = 0
        self.start = self.sample()

    def sample(self) -> MemoryUsage:
        """Return the counters of this moment. Cheap enough to be called for every token."""
        rss_bytes, peak_bytes, anon_bytes, file_bytes = self._platform.memory_counters()
        # Linux keeps its peak from per-core counters that lag behind by some 100 kB per core: a sample may
        # have seen more than the peak admits
        self._highest_bytes = max(self._highest_bytes, rss_bytes, peak_bytes)
        return MemoryUsage(rss_bytes, self._highest_bytes, anon_bytes, file_bytes)
