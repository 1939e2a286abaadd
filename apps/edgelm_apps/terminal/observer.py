"""Puts the status together: what the last piece of an answer said, and what the device says. Draws nothing."""

from __future__ import annotations

import time
from collections import deque
from typing import TYPE_CHECKING

from edgelm_apps.terminal.status import Doing, Status

if TYPE_CHECKING:
    from edgelm import Model, Usage

WINDOW_S = 2.0
"""The time over which the speed of the flash is taken."""
SENSE_S = 2.0
"""How old memory and temperature may be where no answer brings them."""
PROCESSORS = ("cpu_thermal", "cpu-thermal", "soc_thermal", "coretemp", "k10temp", "zenpower", "x86_pkg_temp")
"""Names of sensors that are the processor's; those of disks and batteries say nothing here."""


class Observer:
    """Watches one model, called `name`."""

    def __init__(self, model: Model, name: str) -> None:
        self._model, self._name = model, name
        self._usage: Usage | None = None
        self._doing: Doing = "waiting"
        self._began = time.perf_counter()
        self._reads: deque[tuple[float, int]] = deque()
        self._sensed: tuple[int, float | None] = (0, None)
        self._sensed_at = -SENSE_S

    def begins(self, doing: Doing) -> None:
        """The model reads a prompt, or works for a command, or waits."""
        self._doing, self._began = doing, time.perf_counter()
        if doing == "reading":
            self._reads.clear()

    def hears(self, usage: Usage) -> None:
        """A piece of an answer came; from any thread."""
        self._doing, self._usage = "answering", usage

    def status(self, n_waiting: int = 0, scrolled: bool = False) -> Status:
        """Return what is known now."""
        now = time.perf_counter()
        usage = self._usage
        answering = self._doing == "answering" and usage is not None
        rss_bytes, degrees = self._sense(now)
        if usage is not None and answering:
            rss_bytes = usage.rss_bytes
        plan = self._model.plan
        return Status(
            self._name,
            self._model.backend,
            plan.budget_bytes,
            self._doing,
            now - self._began,
            usage,
            rss_bytes,
            self._flash(usage, now),
            degrees,
            plan.simulated,
            n_waiting,
            scrolled,
        )

    def _flash(self, usage: Usage | None, now: float) -> float:
        """Return the speed of the flash: of the last seconds while an answer comes, of all of it afterwards."""
        if usage is None or self._doing == "reading":
            return 0.0
        n_bytes = usage.bytes_streamed + usage.kv_bytes_read
        if self._doing != "answering":
            return n_bytes / usage.elapsed_s if usage.elapsed_s else 0.0
        self._reads.append((now, n_bytes))
        while len(self._reads) > 2 and now - self._reads[0][0] > WINDOW_S:
            self._reads.popleft()
        then, before = self._reads[0]
        return (n_bytes - before) / (now - then) if now > then else 0.0

    def _sense(self, now: float) -> tuple[int, float | None]:
        if now - self._sensed_at >= SENSE_S:
            import psutil

            self._sensed = psutil.Process().memory_info().rss, processor_temperature()
            self._sensed_at = now
        return self._sensed


def processor_temperature() -> float | None:
    """Return the temperature of the processor in °C; None where no sensor is known to be of it."""
    import psutil

    read = getattr(psutil, "sensors_temperatures", None)  # not on every system
    found = read() if read is not None else {}
    hottest = [max(sensor.current for sensor in found[name]) for name in PROCESSORS if found.get(name)]
    return hottest[0] if hottest else None
