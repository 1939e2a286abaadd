"""The entry points of installed packages, recalled while the folders that packages lie in are as they were.

Listing them takes 5 to 40 ms, which every start that considers a stranger's backend would pay.
"""

from __future__ import annotations

import os
import sys

from edgelm.cachedir import cache_dir, read_json, write_json
from edgelm.engine.machine import digest

GROUPS = ("edgelm.backends", "edgelm.architectures")


def entries(group: str) -> dict[str, str]:
    """Return the entry points of one of `GROUPS`: name and what it points to, as `module:attribute`."""
    # installing, upgrading and removing a package each change the folder that it lies in
    folders = [[folder, _changed_ns(folder)] for folder in sys.path if _holds_packages(folder)]
    place = cache_dir() / "entries" / f"{digest(sys.prefix)}.json"
    kept = read_json(place)
    if kept is not None and kept.get("folders") == folders:
        try:
            return {str(name): str(target) for name, target in kept["groups"][group].items()}
        except (AttributeError, KeyError):
            pass  # of another edgelm: listed again
    from importlib.metadata import entry_points

    groups = {name: {entry.name: entry.value for entry in entry_points(group=name)} for name in GROUPS}
    write_json(place, {"folders": folders, "groups": groups})
    return groups[group]


def _holds_packages(folder: str) -> bool:
    try:
        return any(name.endswith((".dist-info", ".egg-info")) for name in os.listdir(folder or "."))
    except NotADirectoryError:
        return True  # an archive may hold some
    except OSError:
        return False


def _changed_ns(folder: str) -> int:
    try:
        return os.stat(folder or ".").st_mtime_ns
    except OSError:
        return 0
