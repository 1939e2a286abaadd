"""Stop strings in streamed text."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgelm.errors import ConfigError
from edgelm.text.stops import StopMatcher


def run(stops: list[str], pieces: list[str]) -> tuple[str, str | None]:
    matcher = StopMatcher(stops)
    text = "".join(matcher.feed(piece) for piece in pieces) + matcher.flush()
    return text, matcher.stopped


def expected(stops: list[str], text: str) -> tuple[str, str | None]:
    found = [(text.find(stop) + len(stop), text.find(stop), stop) for stop in stops if stop in text]
    if not found:
        return text, None
    _, at, stop = min(found)
    return text[:at], stop


@given(
    stops=st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=4),
    pieces=st.lists(st.text("ab\n", max_size=5), max_size=12),
)
def test_the_first_complete_stop_cuts_however_the_text_is_cut(stops: list[str], pieces: list[str]) -> None:
    assert run(stops, pieces) == expected(stops, "".join(pieces))


def test_only_a_possible_beginning_is_held_back() -> None:
    matcher = StopMatcher(["\nUser:", "###"])
    assert matcher.feed("Hello\n") == "Hello"
    assert matcher.feed("Us") == ""
    assert matcher.feed("ually ##") == "\nUsually "
    assert matcher.feed("# rest") == ""
    assert matcher.stopped == "###"
    assert matcher.feed("more") == matcher.flush() == ""


def test_overlapping_stops_cut_at_the_one_complete_first() -> None:
    assert run(["abcdef", "cd"], list("xabcdef")) == ("xab", "cd")
    assert run(["aab"], list("aaab")) == ("a", "aab")


def test_no_stops_pass_everything_at_once() -> None:
    matcher = StopMatcher([])
    assert matcher.feed("anything") == "anything"


def test_an_empty_stop_is_refused() -> None:
    with pytest.raises(ConfigError, match="empty"):
        StopMatcher(["x", ""])
