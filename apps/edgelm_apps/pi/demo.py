"""The demo itself: a chat, and beside it what it takes on this board; on the full screen, or in lines."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from edgelm_apps.pi.vitals import Vitals, read_vitals

if TYPE_CHECKING:
    from edgelm import Usage
    from edgelm_apps.pi.preparing import Prepared
    from edgelm_apps.pi.target import Target
    from edgelm_apps.terminal.status import Segment

SYSTEM = "You are a helpful assistant that runs on a Raspberry Pi, without any network. Answer briefly."
SENSE_S = 2.0
"""How old what the board says of itself may be: a status line is drawn many times a second."""


class Status:
    """What the status line says of the board. `tell` hears a sentence, once, on what the board needs."""

    def __init__(self, target: Target, tell: Callable[[str], None]) -> None:
        self._target, self._tell = target, tell
        self._told: set[str] = set()
        self._vitals, self._read_at = Vitals(None, None), -SENSE_S

    def line(self, usage: Usage) -> str:
        """Return the line below an answer, the most important pieces first."""
        from edgelm.sizes import human

        read_bytes = usage.bytes_streamed + usage.kv_bytes_read
        flash = f"flash {human(read_bytes / usage.read_s)}/s" if read_bytes and usage.read_s else "flash at rest"
        memory = f"{human(usage.rss_bytes)} of {human(usage.budget_bytes)}"
        speed = f"{usage.decode_tps:.1f} tok/s"
        return " · ".join([self._target.name, speed, memory, flash, *self.vitals().segments()])

    def segments(self) -> Sequence[Segment]:
        """Return the segments of the full screen: the usual ones, with what the board says of itself."""
        from edgelm_apps.terminal import status

        return (
            status.work,
            lambda _: self._target.name,
            status.scrolled,
            status.waiting,
            status.memory,
            status.flash,
            lambda _: status.BETWEEN.join(self.vitals().segments()),
            status.model,
            status.backend,
        )

    def vitals(self) -> Vitals:
        """Return the state of the board; of a simulated one nothing is known."""
        now = time.perf_counter()
        if self._target.device is None and now - self._read_at >= SENSE_S:
            self._vitals, self._read_at = read_vitals(self._target.root), now
            advice = (throttling := self._vitals.throttling) and throttling.advice
            if advice and advice not in self._told:
                self._told.add(advice)
                self._tell(advice)
        return self._vitals


def run_demo(
    prepared: Prepared, target: Target, system: str | None, sampling: dict[str, Any], *, plain: bool, quiet: bool
) -> int:
    """Load what was prepared and talk until the user leaves; return the exit code."""
    from edgelm_apps import terminal
    from edgelm_apps.chat import in_lines, on_screen, opened
    from edgelm_apps.conversation import Conversation
    from edgelm_apps.engine import start_lines
    from edgelm_apps.output import Asides

    colours = terminal.prepare() if terminal.serves() and not plain else None
    asides = Asides(quiet)
    status = Status(target, asides.add)
    with opened(prepared.path, prepared.engine, quiet=quiet, full=colours is not None) as loaded:
        conversation = Conversation(loaded, system or SYSTEM, "trim", sampling, asides, status=status.line)
        told = [] if quiet else start_lines(loaded)
        if colours is not None:
            return on_screen(conversation, prepared.path, colours, told, status.segments())
        conversation.shows_status = not quiet
        return in_lines(conversation, told, greet=not quiet)
