"""A chat on the whole screen of a terminal: `screen` draws and hears keys, `talk` puts a conversation behind it.

An application with a status line of its own gives `Talk` more segments (`status`).
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from edgelm_apps.terminal.code import Colours


def serves() -> bool:
    """Say whether a full screen can be drawn: keys and eyes at a terminal that moves its cursor."""
    return sys.stdin.isatty() and sys.stdout.isatty() and os.environ.get("TERM", "dumb") not in ("", "dumb")


def prepare() -> Colours:
    """Import and build what drawing takes, before a model is planned: then the plan counts it."""
    from edgelm_apps.terminal import talk  # noqa: F401
    from edgelm_apps.terminal.code import Colours
    from edgelm_apps.terminal.growing import Growing

    colours = Colours()
    colours.warm()
    sample = Growing(colours)
    sample.feed("# a\n\n- **b** `c`\n\n| d |\n|---|\n| e |\n\n```python\nf = 1\n```\n")
    sample.lines(80)
    return colours
