"""The chat on the full screen, behind a pseudo-terminal, as an emulator shows it."""

from __future__ import annotations

import re
import signal
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from edgelm.testing import tiny_model

pytest.importorskip("pyte", reason="the terminal's emulator is not installed (pip install '.[test]')")
from emulated import BACK, FAKE_CLI, Emulated

COLOURS = re.compile(r"\x1b\[(?:\d+;)*(?:3[0-8]|4[0-8]|9\d|10[0-7])[;m]")
PASTE, PASTED = "\x1b[200~", "\x1b[201~"
Open = Callable[..., Emulated]


@pytest.fixture
def opened(model_file: str) -> Iterator[Open]:
    """Open a chat with the simulated engine that is ready for a message; `delay_s` between its words."""
    chats: list[Emulated] = []

    def open_chat(*argv: str, delay_s: float = 0.0, columns: int = 80, rows: int = 24, **env: str) -> Emulated:
        command = (FAKE_CLI, "chat", model_file, *argv)
        chats.append(Emulated(*command, columns=columns, rows=rows, FAKE_DELAY_S=str(delay_s), **env))
        chats[-1].look("ready")
        return chats[-1]

    yield open_chat
    for chat in chats:
        chat.close()


def test_an_answer_is_rendered_and_stays_in_the_terminal(opened: Open) -> None:
    chat = opened()
    chat.look("the simulated plan gave in once")
    chat.look("/100 MB · model · simulated")
    chat.type("a **strong** word\r")
    chat.look("echo: none#1 a strong word")
    assert chat.bold("strong word")
    assert not chat.bold("echo:")
    chat.look("10.0 tok/s")
    chat.type("/exit\r")
    assert chat.end() == 0
    assert chat.attributes() == chat.before
    screen, _, left = chat.raw.rpartition(BACK)
    assert "\x1b[?1049h" in screen
    assert "> a **strong** word" in re.sub(r"\x1b\[[\d;]*m", "", left)
    assert "echo: none#1 a strong word" in re.sub(r"\x1b\[[\d;]*m", "", left)
    assert "\x1b[?25h" in chat.raw[chat.raw.rindex("\x1b[?25l") :], "the cursor is hidden"
    assert chat.raw.rindex("\x1b[?2004l") > chat.raw.rindex("\x1b[?2004h"), "pastes are still marked"


def test_an_answer_is_stopped_and_the_chat_goes_on(opened: Open) -> None:
    chat = opened(delay_s=0.03)
    chat.type("w " * 300 + "\r")
    chat.look("echo: none#1 w w")
    chat.type("next while it streams")
    chat.look("> next while it streams")
    chat.type("\x03")
    chat.look("stopped")
    chat.type("\r")
    chat.look("echo: none#2 next while it streams")
    chat.type("\x03")
    chat.look("Ctrl-C again, Ctrl-D or /exit leaves")
    chat.type("\x03")
    assert chat.end() == 0


def test_messages_and_commands_typed_meanwhile_wait_for_their_turn(opened: Open) -> None:
    chat = opened(delay_s=0.05)
    chat.type("w " * 20 + "\r")
    chat.look("none#1 w w")
    chat.type("second\r/system be kind\rthird\r/stats\r")
    assert "60% waiting for flash" in chat.look("peak 90 MB of 100 MB", absent="#2"), "statistics need not wait"
    chat.look("echo: none#2 second")
    chat.look("echo: be kind#1 third")


def test_messages_of_several_lines(opened: Open) -> None:
    chat = opened()
    chat.type("one\\\rtwo\x0athree\x1b\rfour")
    chat.look("> one\n  two\n  three\n  four")
    chat.type("\r")
    chat.look("echo: none#1 one\ntwo\nthree\nfour")
    chat.type(f"{PASTE}five\nsix\nseven{PASTED}\r")
    chat.look("echo: none#2 five\nsix\nseven")


def test_history_is_kept_for_both_modes_and_is_private(opened: Open, home: Path) -> None:
    chat = opened()
    chat.type("first\\\rsecond line\r")
    chat.look("echo: none#1 first")
    chat.type("another\r")
    chat.look("echo: none#2 another")
    chat.type("\x04")
    assert chat.end() == 0
    kept = home / "home" / ".local" / "state" / "edgelm" / "chat_history"
    assert kept.read_text() == "first\\\nsecond line\nanother\n"
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600
    chat = opened()
    chat.type("\x12sec")
    chat.look("> first\n  second line")
    chat.type("\r\r")
    chat.look("echo: none#1 first\nsecond line")
    chat.type("\x04")
    assert chat.end() == 0


def test_commands_are_completed(opened: Open, home: Path) -> None:
    saved = home / "home" / ".local" / "share" / "edgelm" / "chats"
    saved.mkdir(parents=True)
    (saved / "my talk.json").write_text("{}")
    chat = opened()
    chat.type("/st")
    chat.look(" /stats ")
    chat.type("\t o")
    assert " on\n" in chat.look(" off ")
    chat.type("ff\r")
    chat.look("no more statistics")
    chat.type("/load m")
    chat.look(" my talk ")
    chat.type("\x15/help\r")
    chat.look("leave (Ctrl-D does it too)")
    chat.look("PageUp and PageDown scroll")


def test_a_narrow_terminal(opened: Open) -> None:
    chat = opened(columns=40, rows=20)
    chat.type("a message that is much longer than forty columns, as messages are\r")
    chat.look("echo: none#1 a message that is much\nlonger than forty columns, as messages\nare")
    assert " 10.0 tok/s · " in chat.look("/100 MB · flash 35 MB/s")
    assert all(len(line) <= 40 for line in chat.lines)


def test_no_colours_on_demand(opened: Open) -> None:
    code = f"{PASTE}\n```python\ndef f(): return 1\n```{PASTED}\r"
    chat = opened()
    chat.type(code)
    chat.look("── python")
    chat.look("\ndef f(): return 1\n───")
    assert chat.colour("f():") != "default"
    assert COLOURS.search(chat.raw)
    chat = opened(NO_COLOR="1")
    chat.type(code)
    chat.look("── python")
    chat.type("\x04")
    assert chat.end() == 0
    assert not COLOURS.search(chat.raw)


def test_another_size_breaks_lines_anew(opened: Open) -> None:
    chat = opened(columns=60)
    chat.type("these words stand in one line of sixty\r")
    chat.look("echo: none#1 these words stand in one line of sixty")
    chat.resize(30, 12)
    chat.look("echo: none#1 these words stand\nin one line of sixty")
    chat.resize(70, 24)
    chat.look("echo: none#1 these words stand in one line of sixty")


def test_the_conversation_scrolls(opened: Open) -> None:
    chat = opened(rows=12)
    for number in range(1, 8):
        chat.type(f"message {number}\r")
        chat.look(f"echo: none#{number} message {number}")
    assert "message 3" not in chat.text
    chat.type("\x1b[5~")
    chat.look("more below", absent="message 7")
    chat.look("echo: none#4 message 4")
    chat.type("\x1b[1;5H")
    chat.look("the simulated plan gave in once", absent="message 4")
    chat.type("\x1b[1;5F")
    chat.look("echo: none#7 message 7", absent="more below")


def test_errors_and_what_others_write_are_entries(opened: Open) -> None:
    chat = opened()
    chat.type("overflow\r")
    chat.look("error: the prompt has 999 tokens")
    chat.type("noise\r")
    shown = chat.look("a library complains")
    assert "echo: none#2 noise" in chat.look("none#2 noise")
    assert shown.splitlines()[-1].startswith(">"), "the editor is where it was"


def test_the_last_answer_is_tried_again(opened: Open) -> None:
    chat = opened()
    chat.type("/retry\r")
    chat.look("there is no answer yet")
    chat.type("hello\r")
    chat.look("echo: none#1 hello")
    chat.type("/retry\r")
    chat.look("with a temperature of 0.8")
    chat.look("echo: none#2 hello")
    chat.type("/retry hot\r")
    chat.look("/retry takes a temperature")


def test_a_defect_gives_the_terminal_back_before_its_traceback(opened: Open) -> None:
    chat = opened()
    chat.type("defect\r")
    assert chat.end() == 1
    assert chat.attributes() == chat.before
    assert "RuntimeError: this should not have happened" in chat.raw.rpartition(BACK)[2]


def test_a_signal_leaves_the_terminal_as_it_was(opened: Open) -> None:
    chat = opened(delay_s=0.05)
    chat.type("w " * 100 + "\r")
    chat.look("none#1 w w")
    chat.child.send_signal(signal.SIGTERM)
    assert chat.end() == 0
    assert chat.attributes() == chat.before
    assert "none#1 w w" in chat.raw.rpartition(BACK)[2]


def test_a_terminal_that_is_closed_ends_the_chat(opened: Open) -> None:
    chat = opened(delay_s=0.05)
    chat.type("w " * 100 + "\r")
    chat.look("none#1 w w")
    chat.hang_up()
    assert chat.child.wait(20) == 0


@pytest.mark.parametrize(("argv", "env"), [(["--plain"], {}), ([], {"TERM": "dumb"})])
def test_lines_where_they_are_asked_for(model_file: str, argv: list[str], env: dict[str, str]) -> None:
    chat = Emulated(FAKE_CLI, "chat", model_file, *argv, **env)
    try:
        chat.look(">>>")
        chat.type("hi\r")
        chat.look("echo: none#1 hi\n>>>")
        assert "\x1b[?1049h" not in chat.raw
        chat.type("/exit\r")
        assert chat.end() == 0
    finally:
        chat.close()


def test_a_budget_without_room_for_the_screen_says_what_helps(model_file: str) -> None:
    chat = Emulated(FAKE_CLI, "chat", model_file, "--memory", "1MB", columns=200)
    try:
        assert chat.end() == 6
        assert "the full screen takes part of the budget; --plain needs less" in chat.text
        assert "\x1b[?1049h" not in chat.raw
    finally:
        chat.close()


def test_a_real_model(tmp_path: Path) -> None:
    path = tiny_model(tmp_path / "tiny.gguf", "llama", n_vocab=384, head_dim=32)
    options = ["--memory", "300MB", "--backend", "numpy", "--threads", "1", "--context", "256", "--max-tokens", "24"]
    chat = Emulated("-m", "edgelm_apps.cli", "chat", str(path), *options)
    try:
        chat.look("ready", timeout_s=60)
        chat.type("the cat\r")
        chat.look("the answer reached its length limit")
        chat.type("/budget 250MB\r")
        chat.look("budget 250 MB: predicted")
        chat.look("/250 MB")
        chat.type("/save a talk\r/clear\r/load a talk\r")
        chat.look("2 messages are back; nothing has to be computed again")
        chat.type("/stats on\rand a dog\r")
        chat.look(" of 250 MB;")
        chat.type("\x04")
        assert chat.end() == 0
    finally:
        chat.close()
