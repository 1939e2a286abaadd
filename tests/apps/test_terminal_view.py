"""What is in sight of a conversation, what the status line says, and what is kept of what was typed."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from edgelm_apps.history import LIBEDIT, MOST_LINES, History
from edgelm_apps.terminal import view as views
from edgelm_apps.terminal.code import Colours
from edgelm_apps.terminal.lines import Line
from edgelm_apps.terminal.status import SEGMENTS, Status, status_text
from edgelm_apps.terminal.view import Answer, Plain, View

STATUS = Status(
    "tiny", "numpy", 110_000_000, rss_bytes=88_400_000, flash_bytes_per_s=67e6, temperature=51.2, simulated="pi4-sd"
)


class Counted(Plain):
    """A note that counts how often it is laid out."""

    asked = 0

    def lines(self, width: int) -> tuple[list[Line], list[Line]]:
        Counted.asked += 1
        return super().lines(width)


def texts(view: View, width: int = 20, height: int = 4) -> list[str]:
    return ["".join(text for _, text in line) for line in view.in_sight(width, height)]


@pytest.fixture
def view() -> View:
    view = View()
    for number in range(10):
        view.add(Plain(f"line {number}"))
    return view


def test_the_end_is_in_sight_and_stays_there(view: View) -> None:
    assert texts(view) == ["line 6", "line 7", "line 8", "line 9"]
    view.add(Plain("line 10"))
    assert texts(view)[-1] == "line 10"


def test_scrolling_stays_where_it_is_while_lines_come(view: View) -> None:
    texts(view)
    view.scroll(-2)
    assert not view.follows
    assert texts(view) == ["line 4", "line 5", "line 6", "line 7"]
    view.add(Plain("line 10"))
    assert texts(view) == ["line 4", "line 5", "line 6", "line 7"]
    view.scroll(-100)
    assert texts(view) == ["line 0", "line 1", "line 2", "line 3"]
    view.scroll(1)
    assert texts(view) == ["line 1", "line 2", "line 3", "line 4"]
    view.scroll(100)
    assert view.follows
    assert texts(view)[-1] == "line 10"


def test_a_short_conversation_does_not_scroll() -> None:
    view = View()
    view.scroll(-3)
    view.add(Plain("only"))
    texts(view)
    view.scroll(-3)
    view.to_beginning()
    assert view.follows
    assert texts(view) == ["only"]


def test_another_width_lays_out_anew(view: View) -> None:
    view.add(Plain("words that are broken", mark="> "))
    assert texts(view, 14, 2) == ["> words that", "  are broken"]
    assert texts(view, 30, 2) == ["line 9", "> words that are broken"]


def test_columns_go_on_below_their_second_column() -> None:
    assert ["".join(text for _, text in line) for line in Plain("/help   lists what there is").lines(20)[0]] == [
        "/help   lists what",
        "        there is",
    ]


def test_a_new_word_costs_the_same_in_a_long_conversation(monkeypatch: pytest.MonkeyPatch) -> None:
    view = View()
    for number in range(1500):
        view.add(Counted(f"line {number}"))
    answer = Answer(Colours())
    view.add(answer)
    Counted.asked = 0
    for _ in range(100):
        answer.feed("word ")
        texts(view, 40, 20)
    assert Counted.asked <= 100 * 20


def test_the_oldest_entries_are_given_up(view: View, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(views, "MOST_LETTERS", 20)
    assert texts(view, height=10) == ["line 7", "line 8", "line 9"]
    monkeypatch.setattr(views, "MOST_ENTRIES", 2)
    assert texts(view, height=10) == ["line 8", "line 9"]


@pytest.mark.parametrize(
    ("width", "expected"),
    [
        (80, "ready · simulated pi4-sd · 88/110 MB · flash 67 MB/s · 51 °C · tiny · numpy"),
        (40, "ready · simulated pi4-sd · 88/110 MB"),
        (8, "ready"),
        (2, ""),
    ],
)
def test_a_status_line_shows_what_fits(width: int, expected: str) -> None:
    assert status_text(STATUS, SEGMENTS, width) == expected


def test_an_application_adds_segments() -> None:
    assert (
        status_text(STATUS, [lambda status: f"board of {status.model}", *SEGMENTS[:1]], 80) == "board of tiny · ready"
    )


@pytest.mark.parametrize(
    "messages", [["one"], ["a\nb", "c"], ["ends with \\ inside\nlast"], ["a\\\nb"], ["日本語", "é\n\nx"]]
)
def test_messages_are_kept(tmp_path: Path, messages: list[str]) -> None:
    path = tmp_path / "state" / "history"
    history = History(path)
    for message in messages:
        history.add(message)
        history.add(message)
        history.add("  ")
    assert History(path).entries == messages
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_message_that_ends_with_a_backslash_does_not_swallow_the_next(tmp_path: Path) -> None:
    history = History(tmp_path / "history")
    history.add("C:\\")
    history.add("next")
    assert [entry.rstrip() for entry in History(tmp_path / "history").entries] == ["C:\\", "next"]


def test_a_long_history_is_cut_and_one_of_libedit_converted(tmp_path: Path) -> None:
    path = tmp_path / "history"
    path.write_text("".join(f"line {number}\n" for number in range(MOST_LINES + 5)))
    assert History(path).entries[0] == "line 5"
    assert len(path.read_text().splitlines()) == MOST_LINES
    path.write_text(f"{LIBEDIT}\nhello\\040world\n")
    assert History(path).entries == ["hello world"]
    assert path.read_text() == "hello world\n"


def test_a_history_that_cannot_be_kept_says_why(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    history = History(tmp_path / "file" / "history")
    history.add("hello")
    assert "could not be saved" in history.trouble
    assert history.entries == ["hello"]
