"""The conversation loop: on a plain pipe in a child process, and on a terminal through a pty."""

from __future__ import annotations

import os
import pty
import re
import select
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

FAKE_CLI = str(Path(__file__).parent / "fake_cli.py")


class Terminal:
    """A chat in a child process behind a pseudo-terminal."""

    def __init__(self, *argv: str) -> None:
        self._master, slave = pty.openpty()
        self.child = subprocess.Popen(
            [sys.executable, FAKE_CLI, "chat", *argv], stdin=slave, stdout=slave, stderr=slave, start_new_session=True,
            preexec_fn=_take_terminal,
        )  # fmt: skip
        os.close(slave)
        self.seen = ""

    def expect(self, pattern: str, timeout_s: float = 10) -> str:
        """Return what came up to the end of `pattern`."""
        deadline = time.monotonic() + timeout_s
        while (match := re.search(pattern, self.seen)) is None:
            left_s = deadline - time.monotonic()
            ready, _, _ = select.select([self._master], [], [], max(0, left_s))
            assert ready, f"{pattern!r} did not come; the terminal shows {self.seen!r}"
            try:
                self.seen += os.read(self._master, 4096).decode(errors="replace")
            except OSError:  # Linux: the child has closed its side
                pytest.fail(f"the chat ended before {pattern!r}; the terminal shows {self.seen!r}")
        before, self.seen = self.seen[: match.end()], self.seen[match.end() :]
        return before

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    def close(self) -> int:
        try:
            return self.child.wait(10)
        finally:
            self.child.kill()
            self.child.wait()
            os.close(self._master)


def _take_terminal() -> None:
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # so that a typed Ctrl-C reaches the child as a signal


@pytest.fixture
def terminal(model_file: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Terminal]:
    monkeypatch.setenv("FAKE_DELAY_S", "0.03")
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setenv("NO_COLOR", "1")
    opened = Terminal(model_file)
    opened.expect(">>> ")
    yield opened
    if opened.child.poll() is None:
        opened.child.kill()
        opened.close()


def test_pipe(child_command, model_file):
    result = child_command("chat", model_file, "-q", stdin=b"one\n\ntwo \\\nlines\n/system be kind\nthree\n")
    assert result.code == 0
    assert result.out == "echo: none#1 one\necho: none#2 two \nlines\necho: be kind#1 three\n"
    assert result.err == "edgelm: a new conversation begins with this system message\n"


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ('"""\na\nb\n"""\n', "a\nb"),
        ('"""a\n\nb"""\n', "a\n\nb"),
        ('"""one line"""\n', "one line"),
        ('"""never closed\n', "never closed"),
        ("a\\", "a"),
    ],
)
def test_messages_of_several_lines(child_command, model_file, typed, message):
    assert child_command("chat", model_file, "-q", stdin=typed.encode()).out == f"echo: none#1 {message}\n"


def test_commands_on_a_pipe(child_command, model_file):
    typed = "/help\n/stats\nhi\n/stats\n/clear\nhi\n/nonsense\n/system\n/exit\nnever read\n"
    result = child_command("chat", model_file, stdin=typed.encode())
    assert "/system TEXT   start over" in result.out
    assert "no answer yet" in result.out
    assert "answer 3 tokens at 10.0 tok/s (predicted 11.0)" in result.out
    assert "60% waiting for flash, 30% computing, 2% sampling, 8% other; flash gave 700 MB/s" in result.out
    assert "peak 90 MB of 100 MB" in result.out
    assert result.out.count("echo: none#1 hi") == 2
    assert "never read" not in result.out
    assert "unknown command /nonsense; /help lists the commands" in result.err
    assert "there is no system message" in result.err


def test_a_status_line_after_each_answer_on_demand(child_command, model_file):
    typed = "one\n/stats on\ntwo\n/stats off\nthree\n/stats maybe\n"
    result = child_command("chat", model_file, "-q", stdin=typed.encode())
    assert result.out == "echo: none#1 one\necho: none#2 two\necho: none#3 three\n"
    assert result.err.splitlines() == [
        "edgelm: a line of statistics follows each answer",
        "10.0 tok/s (predicted 11.0); 80 MB of 100 MB; 60% waiting for flash, 30% computing, 2% sampling, 8% other; "
        "flash gave 700 MB/s while it was read",
        "edgelm: no more statistics",
        "edgelm: /stats takes on, off or nothing, not 'maybe'",
    ]


def test_changes_of_an_adaptive_budget_are_told_between_the_answers(child_command, model_file):
    result = child_command("chat", model_file, "--adaptive", stdin=b"one\n/nonsense\ntwo\n")
    assert result.out == "echo: none#1 one\necho: none#2 two\n"
    change = "memory is short: budget 100 MB -> 80 MB"
    assert result.err.splitlines()[-3:] == [
        change,
        "edgelm: unknown command /nonsense; /help lists the commands",
        change,
    ]
    assert child_command("chat", model_file, "--adaptive", "-q", stdin=b"one\n").err == ""


def test_an_error_on_a_pipe_ends_with_its_exit_code(child_command, model_file):
    result = child_command("chat", model_file, "-q", stdin=b"overflow\nnever asked\n")
    assert (result.code, result.out) == (8, "")
    assert "the prompt has 999 tokens" in result.err


def test_ctrl_c_stops_the_answer_and_the_chat_goes_on(terminal):
    terminal.type("w " * 300 + "\n")
    terminal.expect("echo: none#1 w w")
    terminal.type("\x03")
    terminal.expect("stopped")
    terminal.expect(">>> ")
    terminal.type("again\n")
    terminal.expect("echo: none#2 again")
    terminal.expect(">>> ")
    terminal.type("\x04")
    assert terminal.close() == 0


def test_ctrl_c_twice_at_the_prompt_leaves(terminal):
    time.sleep(0.5)  # Python's readline misses a signal between writing its prompt and waiting for keys
    terminal.type("\x03")
    terminal.expect("leaves")
    terminal.expect(">>> ")
    time.sleep(0.5)
    terminal.type("\x03")
    assert terminal.close() == 0


def test_an_error_on_a_terminal_does_not_end_the_chat(terminal):
    terminal.type("overflow\n")
    terminal.expect("edgelm: error: the prompt has 999 tokens")
    terminal.expect(">>> ")
    terminal.type("/exit\n")
    assert terminal.close() == 0


def test_history_is_kept_for_the_next_chat_and_is_private(terminal, model_file, home):
    terminal.type("remember me\n")
    terminal.expect("echo: none#1 remember me")
    terminal.expect(">>> ")
    terminal.type("/exit\n")
    assert terminal.close() == 0
    kept = home / "home" / ".local" / "state" / "edgelm" / "chat_history"
    assert kept.read_text().splitlines()[-2:] == ["remember me", "/exit"]
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600
    second = Terminal(model_file)
    second.expect(">>> ")
    second.type("\x1b[A\x1b[A\n")  # two lines up
    second.expect("echo: none#1 remember me")
    second.expect(">>> ")
    second.type("\x04")
    assert second.close() == 0
