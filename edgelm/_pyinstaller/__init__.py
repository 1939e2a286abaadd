"""What PyInstaller has to know to freeze an application with edgelm inside; it finds this folder by an entry point.

Modules are found by name at run time here, so their imports cannot be seen in the code.
"""

from __future__ import annotations

from pathlib import Path


def hook_dirs() -> list[str]:
    """Return the folders of the hooks."""
    return [str(Path(__file__).parent)]
