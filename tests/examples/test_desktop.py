"""The desktop example in a real window: answers stream, stopping and closing work, and the window never freezes."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import edgelm

tkinter = pytest.importorskip("tkinter", reason="this Python comes without tkinter")
from edgelm_examples import desktop  # noqa: E402

pytestmark = pytest.mark.usefixtures("display", "loads")
PATIENCE_S = 40.0
TICK_MS = 5
CONTEXT = 2048


@pytest.fixture(autouse=True)
def _windows_go_here() -> Iterator[None]:
    """Collect windows in the thread that made them: in another one, a later model's, Tcl would abort the process."""
    yield
    gc.collect()


class User:
    """Sits before the window, and watches how late its event loop is."""

    def __init__(self, path: Path, memory: str = "2GB") -> None:
        self.root = tkinter.Tk()
        self.assistant = desktop.Assistant(str(path), memory, CONTEXT)
        self.window = desktop.Window(self.root, self.assistant)
        self.gaps_s: list[float] = []

    def wait(self, until: Callable[[], bool]) -> None:
        """Let the window live until something is true; the pauses between its ticks are added to `gaps_s`."""
        deadline = last = time.perf_counter()
        deadline += PATIENCE_S

        def tick() -> None:
            nonlocal last
            now = time.perf_counter()
            self.gaps_s.append(now - last)
            last = now
            if until() or now > deadline:
                self.root.quit()
            else:
                self.root.after(TICK_MS, tick)

        self.root.after(TICK_MS, tick)
        self.root.mainloop()
        assert last <= deadline, f"it never came; the window says {self.status!r}"

    def ask(self, question: str) -> None:
        self.window.entry.insert(0, question)
        self.window.entry.event_generate("<Return>")

    @property
    def shown(self) -> str:
        return str(self.window.talk.get("1.0", "end-1c"))

    @property
    def status(self) -> str:
        return str(self.window.status["text"])

    def close(self) -> None:
        """Click on the window's cross: what the window manager would call."""
        self.root.tk.call(*self.root.tk.splitlist(self.root.protocol("WM_DELETE_WINDOW")))


@contextmanager
def sitting(path: Path, **options: Any) -> Iterator[User]:
    user = User(path, **options)
    try:
        yield user
    finally:
        user.close()
        user.assistant.join()


def test_answers_stream_into_a_window_that_never_freezes(slow: Path) -> None:
    with sitting(slow) as user:
        user.wait(lambda: user.window.state == "idle")
        assert user.status.startswith("numpy, budget 2000 MB")
        user.ask("the cat " * 100)
        assert user.window.state == "answering"
        seen: set[int] = set()
        began, user.gaps_s = time.perf_counter(), []

        def long_enough() -> bool:
            seen.add(len(user.shown))
            return time.perf_counter() - began > 3

        user.wait(long_enough)
        assert len(seen) > 10, "the answer came in a few large pieces"
        assert user.window.state == "answering"
        # a window that waited for the prompt, or for the answer, would be late by nearly all of the three seconds
        assert sum(gap for gap in user.gaps_s if gap > 0.1) < 1
        user.window.button.invoke()
        user.wait(lambda: user.window.state == "idle")
        assert user.status.startswith("cancelled: ")
        assert "the cat the cat" in user.shown


def test_stopping_reaches_into_the_reading_of_a_question(slow: Path) -> None:
    question = "the dog " * 300
    with sitting(slow) as user:
        user.wait(lambda: user.window.state == "idle")
        began = time.perf_counter()
        user.ask("a " + question)
        user.wait(lambda: user.status == "answering…")
        reading_s = time.perf_counter() - began
        user.window.button.invoke()
        user.wait(lambda: user.window.state == "idle")
        user.ask("no " + question)
        pressed = time.perf_counter() + reading_s / 8
        user.wait(lambda: time.perf_counter() > pressed)
        assert user.status == "reading the question…"
        user.window.button.invoke()
        user.wait(lambda: user.window.state == "idle")
        assert time.perf_counter() - pressed < reading_s / 2
        assert user.status.startswith("cancelled: 0 tokens")


def test_a_stop_before_the_model_has_noticed_the_question_is_not_lost(tiny: Path) -> None:
    with sitting(tiny) as user:
        user.wait(lambda: user.window.state == "idle")
        user.ask("the cat")
        user.window.button.invoke()  # in the same moment
        user.wait(lambda: user.window.state == "idle")
        assert user.status.startswith("cancelled: ")
        user.ask("the cat")
        user.wait(lambda: user.status == "answering…")


@pytest.mark.parametrize("when", ["loading", "idle", "answering"])
def test_closing_the_window_ends_everything(slow: Path, when: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`main` returns, and no thread of the model is left."""
    closed, load = threading.Event(), edgelm.load
    if when == "loading":  # a model that takes longer than the user's patience, however fast it really is

        def load_late(*arguments: Any, **options: Any) -> edgelm.Model:
            assert closed.wait(PATIENCE_S)
            return load(*arguments, **options)

        monkeypatch.setattr(edgelm, "load", load_late)

    class Closing(desktop.Window):
        def _poll(self) -> None:
            super()._poll()
            if self.state == "idle" and when == "answering":
                self.entry.insert(0, "the cat")
                self.send()
            elif self.state == when and (when != "answering" or self.status["text"] == "answering…"):
                self.root.tk.call(*self.root.tk.splitlist(self.root.protocol("WM_DELETE_WINDOW")))
                closed.set()

    monkeypatch.setattr(desktop, "Window", Closing)
    before = set(threading.enumerate())
    assert desktop.main([str(slow), "--memory", "2GB", "--context", str(CONTEXT)]) == 0
    assert closed.is_set()
    assert set(threading.enumerate()) <= before


@pytest.mark.parametrize(
    ("name", "memory", "said"),
    [("nothing.gguf", "2GB", "nothing.gguf"), ("tiny.gguf", "1MB", "budget 1 MB is too small")],
)
def test_a_mistake_is_a_sentence_in_the_window(tiny: Path, name: str, memory: str, said: str) -> None:
    with sitting(tiny.with_name(name), memory=memory) as user:
        user.wait(lambda: user.window.state == "broken")
        assert said in user.status
        assert user.window.button.instate(["disabled"])
        user.ask("the cat")
        assert user.shown == ""


def test_a_question_that_is_too_long_is_a_sentence_and_the_next_one_works(tiny: Path) -> None:
    with sitting(tiny) as user:
        user.wait(lambda: user.window.state == "idle")
        user.ask("the cat " * 3000)
        user.wait(lambda: user.window.state == "idle")
        assert "the context holds 2048" in user.status
        user.ask("the cat")
        user.wait(lambda: user.status == "answering…")
