"""The status line: what is known at this moment, and the segments that say it.

A segment is a function from the status to a text, empty where there is nothing to say. The first segments are the most
important: a narrow terminal shows as many as fit. An application adds its own to `SEGMENTS`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from edgelm.sizes import human

if TYPE_CHECKING:
    from edgelm import Usage

Doing = Literal["waiting", "reading", "answering", "working"]
BETWEEN = " · "


@dataclass(frozen=True, slots=True)
class Status:
    """What the segments may speak of. `doing_s`: since when. `n_waiting`: messages that wait for their turn."""

    model: str
    backend: str
    budget_bytes: int
    doing: Doing = "waiting"
    doing_s: float = 0.0
    usage: Usage | None = None
    rss_bytes: int = 0
    flash_bytes_per_s: float = 0.0
    temperature: float | None = None
    simulated: str | None = None
    n_waiting: int = 0
    scrolled: bool = False


Segment = Callable[[Status], str]


def work(status: Status) -> str:
    usage = status.usage
    if status.doing == "reading":
        return f"reading {status.doing_s:.0f} s"
    if status.doing == "working":
        return f"working {status.doing_s:.0f} s"
    return f"{usage.decode_tps:.1f} tok/s" if usage is not None and usage.decode_tps else "ready"


def simulated(status: Status) -> str:
    return f"simulated {status.simulated}" if status.simulated else ""


def scrolled(status: Status) -> str:
    return "more below" if status.scrolled else ""


def waiting(status: Status) -> str:
    return f"{status.n_waiting} waiting" if status.n_waiting else ""


def memory(status: Status) -> str:
    return f"{_mega(status.rss_bytes)}/{human(status.budget_bytes)}" if status.rss_bytes else ""


def flash(status: Status) -> str:
    return f"flash {human(status.flash_bytes_per_s)}/s" if status.flash_bytes_per_s else ""


def temperature(status: Status) -> str:
    return f"{status.temperature:.0f} °C" if status.temperature is not None else ""


def model(status: Status) -> str:
    return status.model


def backend(status: Status) -> str:
    return status.backend


SEGMENTS: Sequence[Segment] = (
    work, simulated, scrolled, waiting, memory, flash, temperature, model, backend,
)  # fmt: skip


def status_text(status: Status, segments: Sequence[Segment], width: int) -> str:
    """Return as many segments as fit into `width` columns; one that does not fit makes room for shorter ones."""
    text = ""
    for segment in segments:
        part = segment(status)
        longer = f"{text}{BETWEEN}{part}" if text and part else text or part
        if len(longer) <= width:
            text = longer
    return text


def _mega(n_bytes: int) -> str:
    return f"{n_bytes / 1e6:.0f}"
