"""The operating system behind one small interface; `current_platform` is the only choice made here."""

from __future__ import annotations

import sys
from functools import cache

from edgelm.memory.platform.allocator import trim, tune_allocator
from edgelm.memory.platform.base import Platform

__all__ = ["Platform", "current_platform", "trim", "tune_allocator"]


@cache
def current_platform() -> Platform:
    """Return the platform that this process runs on. Unknown systems are treated as Linux-like POSIX."""
    if sys.platform == "win32":
        from edgelm.memory.platform.windows import Windows

        return Windows()
    if sys.platform == "darwin":
        from edgelm.memory.platform.macos import MacOS

        return MacOS()
    if sys.platform == "ios":
        from edgelm.memory.platform.ios import IOS

        return IOS()
    from edgelm.memory.platform.linux import Linux

    return Linux()
