"""The entry points of installed packages, recalled while the folders that packages lie in are as they were.

Listing them takes 5 to 40 ms, which every start that considers a stranger's backend would pay.
"""

from __future__ import annotations

import os
import sys
from functools import lru_cache

from edgelm.cachedir import cache_dir, read_json, write_json
from edgelm.engine.machine import digest

GROUPS = ("edgelm.backends", "edgelm.architectures")


def entries(group: str) -> dict[str, str]:
    """Return the entry points of one of `GROUPS`: name and what it points to, as `module:attribute`."""
    # installing, upgrading and removing a package each change the folder that it lies in
    return _all(tuple((folder, _changed_ns(folder)) for folder in sys.path))[group]


@lru_cache(maxsize=1)
def _all(folders: tuple[tuple[str, int], ...]) -> dict[str, dict[str, str]]:
    found = [[folder, changed_ns] for folder, changed_ns in folders if _holds_packages(folder)]
    place = cache_dir() / "entries" / f"{digest(sys.prefix)}.json"
    kept = read_json(place)
    if kept is not None and kept.get("folders") == found:
        try:
            return {group: {str(k): str(v) for k, v in kept["groups"][group].items()} for group in GROUPS}
        except (AttributeError, KeyError, TypeError):
            pass  # of another edgelm: listed again
    from importlib.metadata import entry_points

    groups = {group: {entry.name: entry.value for entry in entry_points(group=group)} for group in GROUPS}
    write_json(place, {"folders": found, "groups": groups})
    return groups


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
