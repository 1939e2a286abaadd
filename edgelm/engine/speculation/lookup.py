"""Guess from the text itself: what followed the last time that the newest tokens stood there.

Prompt look-up: summaries, edits and answers from a text repeat much of what they were given.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from edgelm.engine.speculation.chances import Chances
from edgelm.engine.speculation.drafts import Guess
from edgelm.sequences import n_common

LEAST, MOST = 2, 32
"""Tokens that must have stood there in the same order, and how many are compared at the most."""
_CANDIDATES = 8
"""Earlier places that are looked at, the latest first."""
_FIRST = {2: 0.25, 3: 0.4, 4: 0.5, 5: 0.6, 7: 0.7, 10: 0.8, 16: 0.9, 32: 0.95}
"""How often the next token was the same, by the tokens that matched so far; a first estimate."""
_STEPS = sorted(_FIRST, reverse=True)
BYTES_PER_TOKEN = 180
"""Memory of the index for each token of the context."""


class Lookup:
    """Places of all pairs of tokens of the text; of equal pairs the later one knows the earlier."""

    def __init__(self, chances: Chances) -> None:
        self._chances = chances
        self._text: list[int] = []
        self._last: dict[tuple[int, int], int] = {}
        self._before: list[int] = []
        self._found: tuple[int, int] | None = None  # where the text goes on, and how many tokens matched

    def begin(self, ids: Sequence[int]) -> None:
        """Take these ids as the text so far; what is known of their beginning is kept."""
        same = n_common(self._text, ids)
        if same < len(self._text):
            self._text, self._last, self._before = [], {}, []
            same = 0
        for token in ids[same:]:
            self._add(token)
        self._search()

    def append(self, token: int) -> None:
        self._add(token)
        self._search()

    def propose(self, path: Sequence[int]) -> Sequence[Guess]:
        """Return the one token that came next the last time, while the path is what came there."""
        if self._found is None:
            return ()
        start, matched = self._found
        depth = len(path)
        # a text that repeats itself goes on with what is guessed here
        if any(self._at(start + i, path) != token for i, token in enumerate(path)):
            return ()
        step = next(step for step in _STEPS if step <= matched + depth)
        key: Hashable = ("look-up", step)
        return (Guess(self._at(start + depth, path), key, self._chances.of(key, _FIRST[step])),)

    def _at(self, place: int, path: Sequence[int]) -> int:
        return self._text[place] if place < len(self._text) else path[place - len(self._text)]

    def _add(self, token: int) -> None:
        text = self._text
        text.append(token)
        if len(text) < LEAST:
            self._before.append(-1)
            return
        pair = text[-2], token
        self._before.append(self._last.get(pair, -1))
        self._last[pair] = len(text) - 1

    def _search(self) -> None:
        """Find the earlier place with the longest match, the latest among equals."""
        text, self._found = self._text, None
        if not text:
            return
        place, longest = self._before[-1], 0
        for _ in range(_CANDIDATES):
            if place < 0:
                break
            matched = LEAST
            while matched < MOST and place >= matched and text[place - matched] == text[-1 - matched]:
                matched += 1
            if matched > longest:
                self._found, longest = (place + 1, matched), matched
            if longest == MOST:
                break
            place = self._before[place]
