"""How a pull reports to whoever asked for it. Draws nothing itself."""

from __future__ import annotations

from typing import Protocol


class Observer(Protocol):
    """What an application shows of a pull. `shows_progress` lets a library that draws its own bar do so."""

    shows_progress: bool

    def notice(self, text: str) -> None:
        """One sentence for the user."""

    def progress(self, label: str, done_bytes: int, total_bytes: int) -> None:
        """`done_bytes` of `total_bytes` have arrived. Called often."""


class Silent:
    """Shows nothing."""

    shows_progress = False

    def notice(self, text: str) -> None:
        pass

    def progress(self, label: str, done_bytes: int, total_bytes: int) -> None:
        pass
