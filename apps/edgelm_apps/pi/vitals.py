"""How the board feels: its temperature, and whether its firmware slows it down for heat or for a weak supply."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

from edgelm_apps.pi.board import ROOT

PATIENCE_S = 2.0
_SYSFS = "sys/devices/platform/soc/soc:firmware/get_throttled"
_NOW = {0: "under-voltage", 1: "clock capped", 2: "throttled", 3: "soft temperature limit"}
_BEFORE = 16
"""Bits that far up say the same of some time since the board was started."""


class Throttling(NamedTuple):
    """What the firmware says: `now`, and `before` now, since the start."""

    now: tuple[str, ...]
    before: tuple[str, ...]

    def __str__(self) -> str:
        if self.now:
            return ", ".join(self.now) + " now"
        return "not throttled" + (f" (before: {', '.join(self.before)})" if self.before else "")

    @property
    def advice(self) -> str | None:
        """A sentence on what to do about it; None if nothing has happened."""
        seen = {*self.now, *self.before}
        if "under-voltage" in seen:
            return "the supply is too weak: a Pi 5 wants 5 V at 5 A, a Pi 4 5 V at 3 A, and cables cost some of it"
        if seen:
            return "the board gets hot and slows down: give it a heat sink or a fan"
        return None


class Vitals(NamedTuple):
    """What is known at a moment; None where the machine does not tell."""

    celsius: float | None
    throttling: Throttling | None

    def segments(self) -> list[str]:
        """Return the pieces of a status line."""
        heat = [f"{self.celsius:.0f} °C"] if self.celsius is not None else []
        return heat + ([str(self.throttling)] if self.throttling is not None else [])


def read_vitals(root: Path = ROOT) -> Vitals:
    """Return the state of this moment. Takes some 10 ms where the firmware is asked through a program."""
    return Vitals(_celsius(root), _throttling(root))


def parse_throttled(text: str) -> Throttling | None:
    """Read `throttled=0x50005` of vcgencmd, or the bare number of the kernel; None for anything else."""
    try:
        bits = int(text.strip().rpartition("=")[2], 16)
    except ValueError:
        return None
    now, before = (tuple(name for bit, name in _NOW.items() if bits >> bit + up & 1) for up in (0, _BEFORE))
    return Throttling(now, before)


def _celsius(root: Path) -> float | None:
    """Return the temperature of the processor. Not psutil's: a board has one zone, and a test another root."""
    zones = sorted((root / "sys/class/thermal").glob("thermal_zone*"))
    named = [zone for zone in zones if _read(zone / "type").startswith("cpu")]
    try:
        return int(_read((named or zones)[0] / "temp")) / 1000
    except (IndexError, ValueError):
        return None


def _throttling(root: Path) -> Throttling | None:
    if text := _read(root / _SYSFS):
        return parse_throttled(text)
    program = shutil.which("vcgencmd") if root == ROOT else None
    if program is None:
        return None
    try:
        done = subprocess.run([program, "get_throttled"], capture_output=True, text=True, timeout=PATIENCE_S)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return parse_throttled(done.stdout)


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
