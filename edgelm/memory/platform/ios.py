"""iOS: as macOS, but what counts is how much the system still grants this application.

Written from the headers and never run on a device: none was at hand. Knows nothing of models or plans.
"""

from __future__ import annotations

import ctypes
from typing import Any

from edgelm.memory.platform.base import Pressure
from edgelm.memory.platform.macos import MacOS


class IOS(MacOS):
    """The system ends an application that goes over its limit, however much memory the device has free."""

    name = "ios"

    def __init__(self, library: Any = None) -> None:
        super().__init__(library or ctypes.CDLL(None, use_errno=True))  # every process there has libSystem loaded
        self._library.os_proc_available_memory.restype = ctypes.c_size_t

    def available_bytes(self) -> int:
        # os/proc.h: 0 for what is no application, and so has no limit of its own
        return int(self._library.os_proc_available_memory()) or super().available_bytes()

    def total_bytes(self) -> int:
        """Return what the application may have in all."""
        return min(self.rss_bytes() + self.available_bytes(), super().total_bytes())

    def pressure(self) -> Pressure:
        # the level of macOS cannot be read there; applications hear of it by a notification, see docs/embedding.md
        return Pressure(self.total_bytes(), self.available_bytes())
