"""Find stop strings in text that comes in pieces, and hold back no more than may still become one."""

from __future__ import annotations

from collections.abc import Iterable

from edgelm.errors import ConfigError


class StopMatcher:
    """Passes text on until one of `stops` occurs.

    The stop that is complete first counts, of several the longest, however the text is cut into pieces. The text
    before it passes exactly; at most one character less than the longest stop is held back. After a stop nothing
    passes any more.
    """

    def __init__(self, stops: Iterable[str]) -> None:
        self._stops = tuple(dict.fromkeys(stops))
        if any(not stop for stop in self._stops):
            raise ConfigError("a stop string is empty; leave it out")
        self._longest = max(map(len, self._stops), default=0)
        self._held = ""
        self.stopped: str | None = None
        """The stop that occurred."""

    def feed(self, piece: str) -> str:
        """Return the text that may be shown now that `piece` has come."""
        if self.stopped is not None:
            return ""
        text = self._held + piece
        found = [(at + len(stop), at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            _, at, self.stopped = min(found)
            self._held = ""
            return text[:at]
        keep = self._unfinished(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """Return what was held back; the text is over."""
        rest, self._held = self._held, ""
        return rest

    def _unfinished(self, text: str) -> int:
        """Return the length of the longest end of `text` that a stop begins with."""
        for n_chars in range(min(self._longest - 1, len(text)), 0, -1):
            end = text[-n_chars:]
            if any(stop.startswith(end) for stop in self._stops):
                return n_chars
        return 0
