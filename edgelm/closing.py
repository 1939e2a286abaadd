"""How an answer that must keep to a form can still be ended: what to write after it, so that it is complete.

A search from where the form's parser is, best first, over tokens of one byte and those that the form forces. It visits
so many states at the most, so it may miss an end; what it finds is one.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from itertools import count
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llguidance import LLMatcher

STATES, FEW = 200, 16
"""States that a search visits, each some 0.1 ms, and one that may fail: where another end is known."""
SLACK = 32
"""From so many tokens before the last moment on every token is checked."""
SELDOM, PART = 16, 8
"""Before that a check is made after so many tokens, or after this part of what is left until then."""

_FREE, _MANY = 60, 10
"""Where more bytes than these may come next a text goes on; kinds of more than `_MANY` are tried last."""
_STEP, _LATER = 0.05, 0.25
"""What a token and a place later in its kind cost, in kinds: a loop is left after some 20 rounds."""
_CLOSING, _QUOTE, _JOINING = b"}])>,;", b'"', b"@.:-/"
_DIGITS, _LOWER, _UPPER = b"0123456789", b"abcdefghijklmnopqrstuvwxyz", b"ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_NAMED = _CLOSING + _QUOTE + _JOINING + _DIGITS + _LOWER + _UPPER
_OTHERS = bytes(b for b in range(32, 127) if b not in _NAMED) + b"\n\t\r"
_INSIDE_CHARACTER = b"\x80\x90\xa0"
_IN_TEXT = (_QUOTE, _DIGITS, _JOINING, _LOWER, _UPPER, _CLOSING, _OTHERS, _INSIDE_CHARACTER)
_BETWEEN = (_CLOSING, _DIGITS, _QUOTE, _JOINING, _LOWER, _UPPER, _OTHERS, _INSIDE_CHARACTER)


class Bytes:
    """The tokens of one byte of a vocabulary, by what they are good for."""

    def __init__(self, words: Iterable[bytes]) -> None:
        # the last one: where a character has a token besides that of its byte, it comes later
        self._ids = {word[0]: i for i, word in enumerate(words) if len(word) == 1}
        self._known = [(b, [self._ids[b]]) for kind in _IN_TEXT for b in kind if b in self._ids]

    def next(self, state: LLMatcher) -> bytes:
        """Return those that may come next."""
        may_come = state.validate_tokens
        return bytes([b for b, ids in self._known if may_come(ids)])

    def kinds(self, may_come: bytes) -> list[list[list[int]]]:
        """Return the ids of these by kind, each as a list; what ends things first, what there is much of last."""
        kinds = ([b for b in kind if b in may_come] for kind in (_IN_TEXT if len(may_come) > _FREE else _BETWEEN))
        some = sorted((kind for kind in kinds if kind), key=lambda kind: len(kind) > _MANY)
        return [[[self._ids[b]] for b in kind] for kind in some]


def short_end(
    start: LLMatcher, alphabet: Bytes, end: int, most: int, known: Sequence[int] = (), states: int = STATES
) -> tuple[int, ...] | None:
    """Return up to `most` ids that complete what `start` has read, the last of them `end`; None if none are found.

    `known`: an end from a state before, which mostly ends this one, too.
    """
    order = count()
    heap: list[tuple[float, int, LLMatcher, tuple[int, ...], list[list[int]]]] = [(0.0, next(order), start, (), [[]])]
    seen = set()
    for _ in range(states):
        if not heap:
            break
        cost, _, before, path, (new, *others) = heapq.heappop(heap)
        if others:
            heapq.heappush(heap, (cost + _LATER, next(order), before, path, others))
        state = before.deep_copy()
        state.consume_tokens(new)
        forced = state.compute_ff_tokens()
        state.consume_tokens(forced)
        path = (*path, *new, *forced)
        if len(path) >= most:
            continue
        if state.is_accepting():
            return (*path, end)
        if (rest := last_part(state, known)) and len(path) + len(rest) <= most:
            return (*path, *rest)
        may_come = alphabet.next(state)
        if (len(path), may_come) in seen:
            continue
        seen.add((len(path), may_come))
        cost += _STEP * (1 + len(forced))
        for rank, kind in enumerate(alphabet.kinds(may_come)):
            heapq.heappush(heap, (cost + rank, next(order), state, path, kind))
    return None


def last_part(state: LLMatcher, known: Sequence[int]) -> tuple[int, ...]:
    """Return the part of `known`, an end from a state before, that completes what `state` has read; or nothing."""
    *ids, end = known or (0,)
    first = next((i for i, token in enumerate(ids) if state.validate_tokens([token])), len(ids))
    after = state.deep_copy()
    n = after.try_consume_tokens(ids[first:])
    return (*ids[first : first + n], end) if known and after.is_accepting() else ()


class Ending:
    """Watches over one answer: a token after which no end would fit is not taken, and a short end is written instead.

    The only change to what a sampler draws; far from the limit there is none.
    """

    def __init__(self, alphabet: Bytes, ends: frozenset[int]) -> None:
        self.ends, self.closed = ends, False
        self._alphabet, self._end = alphabet, min(ends)
        self._known: tuple[int, ...] = ()
        self._known_for, self._due, self._pause = -1, -1, 1

    def taken(self, state: LLMatcher, token: int, n_left: int) -> int:
        """Return the drawn `token`, or the first one of the end. `n_left`: ids that may still come, this one included.

        `state` has read what is before it.
        """
        if token in self.ends or 0 <= self._due < n_left:
            return token
        after = state.deep_copy()
        after.consume_token(token)
        is_known = self._known_for == n_left
        known = self._known[1:] if self._known[:1] == (token,) else self._known
        if end := short_end(after, self._alphabet, self._end, n_left - 1, known, FEW if is_known else STATES):
            self._note(end, n_left - 1)
            return token
        if not is_known:
            if end := short_end(state, self._alphabet, self._end, n_left, self._known):
                self._note(end, n_left)
            else:  # what was not found is seldom found soon
                self._due, self._pause = max(n_left - self._pause, 0), 2 * self._pause
            if self._due < n_left:  # early to give up a token, only since no end was found after it
                return token
        self.closed = True
        token = self._known[0]
        self._note(self._known[1:], n_left - 1)
        return token

    def _note(self, end: tuple[int, ...], n_left: int) -> None:
        """Remember an end for the state with `n_left` ids to come, and when to look again."""
        self._known, self._known_for, self._pause = end, n_left, 1
        spare = n_left - len(end) - SLACK
        self._due = n_left - min(max(SELDOM, spare // PART), max(spare, 0))
