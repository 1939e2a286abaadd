"""The folder of everything that edgelm can make again, and small verdicts kept in it as JSON.

A folder that cannot be read or written costs time at the next start, nothing else. Knows nothing of what is kept.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any


def cache_dir() -> Path:
    """Return the folder for models and derived files: `EDGELM_CACHE`, or the user's cache folder."""
    configured = os.environ.get("EDGELM_CACHE")
    if configured:
        return Path(configured).expanduser().absolute()
    if sys.platform == "linux" and "ANDROID_ROOT" not in os.environ:
        # as platformdirs does (XDG Base Directory Specification), without the 2 MB that importing it costs
        return Path(os.environ.get("XDG_CACHE_HOME", "").strip() or Path.home() / ".cache") / "edgelm"
    from platformdirs import user_cache_path

    return user_cache_path("edgelm", appauthor=False)


def read_json(path: Path) -> dict[str, Any] | None:
    """Return the object in this file; None if there is none that can be read."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def write_json(path: Path, content: dict[str, Any]) -> bool:
    """Replace the file as a whole; False where the folder refuses."""
    # Not tempfile: importing it costs a megabyte. The name is this process's own.
    name = path.with_suffix(f".{os.getpid()}-{time.monotonic_ns()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        name.write_text(json.dumps(content), encoding="utf-8")
        os.replace(name, path)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(name)
        return False
    return True
