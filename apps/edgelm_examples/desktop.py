"""A window to talk with a model: `python apps/edgelm_examples/desktop.py model.gguf --memory 300MB`.

The window never waits for the model. One thread loads it and reads its answers; what it has to say comes through a
queue that the window empties twenty-five times a second. Needs nothing but tkinter, which comes with Python.
"""

from __future__ import annotations

import argparse
import queue
import threading
import tkinter as tk
from collections.abc import Iterator
from tkinter import ttk
from tkinter.scrolledtext import ScrolledText
from typing import Literal, NamedTuple

import edgelm

POLL_MS = 40
"""Text arrives in the window so often: smooth to the eye, and little work for the window."""


class Heard(NamedTuple):
    """What the thread of the model tells the window."""

    kind: Literal["note", "ready", "text", "done", "failed"]
    text: str = ""


class Assistant:
    """A model and one chat with it, in a thread of their own. Knows no window; no method waits for the model."""

    def __init__(self, path: str, memory: str | None, context: int | None = None) -> None:
        self.heard: queue.SimpleQueue[Heard] = queue.SimpleQueue()
        self._asked: queue.SimpleQueue[Iterator[edgelm.Chunk] | None] = queue.SimpleQueue()
        self._how = (path, memory, context)
        self._model: edgelm.Model | None = None
        self._chat: edgelm.Chat | None = None
        self._thread = threading.Thread(target=self._work, name="assistant")
        self._thread.start()

    def ask(self, question: str) -> None:
        """Have a question answered; only after "ready"."""
        assert self._chat is not None
        # made here and read there: `stop` reaches an answer from the moment that it was asked for
        self._asked.put(self._chat.stream(question))

    def stop(self) -> None:
        """Stop the answer, also while the question is still being read."""
        if self._model is not None:
            self._model.cancel()

    def leave(self) -> None:
        """Stop everything; the thread gives the memory back and ends by itself."""
        self._asked.put(None)
        self.stop()

    def join(self) -> None:
        """Wait until the thread has ended."""
        self._thread.join()

    def _work(self) -> None:
        path, memory, context = self._how
        try:
            with edgelm.load(path, memory=memory, context=context, notice=self._note) as model:
                self._chat, self._model = model.chat(overflow="trim"), model
                self.heard.put(Heard("ready", f"{model.backend}, budget {model.plan.budget_bytes / 1e6:.0f} MB"))
                while (chunks := self._asked.get()) is not None:
                    self._answer(chunks)
        except edgelm.EdgeLMError as error:  # each is a sentence with the next step
            self.heard.put(Heard("failed", str(error)))

    def _note(self, sentence: str) -> None:
        self.heard.put(Heard("note", sentence))

    def _answer(self, chunks: Iterator[edgelm.Chunk]) -> None:
        try:
            for chunk in chunks:
                self.heard.put(Heard("text", chunk.text))
        except edgelm.EdgeLMError as error:
            self.heard.put(Heard("done", str(error)))
            return
        usage, why = chunk.usage, chunk.finish_reason
        self.heard.put(
            Heard("done", f"{why}: {usage.completion_tokens} tokens, {usage.decode_tps:.1f} a second, "
                          f"{usage.rss_bytes / 1e6:.0f} MB of {usage.budget_bytes / 1e6:.0f} MB")
        )  # fmt: skip


class Window:
    """The window: a text, a line to write in, a button to send and to stop, and a line that says how it is."""

    def __init__(self, root: tk.Tk, assistant: Assistant) -> None:
        self.root, self.assistant = root, assistant
        self.state: Literal["loading", "idle", "answering", "broken"] = "loading"
        root.title("edgelm")
        root.minsize(420, 300)
        root.columnconfigure(0, weight=1)
        root.rowconfigure(0, weight=1)
        self.talk = ScrolledText(root, wrap="word", state="disabled", font="TkTextFont", padx=12, pady=8, relief="flat")
        self.talk.tag_configure("question", foreground="#1c5d99", spacing1=10, spacing3=4)
        self.talk.grid(columnspan=2, sticky="nsew")
        self.entry = ttk.Entry(root, font="TkTextFont")
        self.entry.grid(row=1, column=0, sticky="ew", padx=(12, 6), pady=8)
        self.entry.bind("<Return>", lambda _: self.send())
        self.button = ttk.Button(root, text="Send", command=self.press)
        self.button.grid(row=1, column=1, padx=(0, 12))
        self.status = ttk.Label(root, text="loading the model…", foreground="#555555")
        self.status.grid(row=2, columnspan=2, sticky="ew", padx=12, pady=(0, 8))
        self.button.state(["disabled"])
        root.protocol("WM_DELETE_WINDOW", self.close)
        root.bind("<Escape>", lambda _: self.assistant.stop())
        self._timer = root.after(POLL_MS, self._poll)
        self.entry.focus_set()

    def press(self) -> None:
        """Send, or stop while an answer is made."""
        if self.state == "answering":
            self.assistant.stop()
        else:
            self.send()

    def send(self) -> None:
        question = self.entry.get().strip()
        if self.state != "idle" or not question:
            return
        self.entry.delete(0, "end")
        self._write(f"{question}\n", "question")
        self._go("answering", "Stop", "reading the question…")
        self.assistant.ask(question)

    def close(self) -> None:
        """Close the window at once; `main` waits for the model's thread."""
        self.assistant.leave()
        self.root.after_cancel(self._timer)
        self.root.destroy()

    def _poll(self) -> None:
        pieces = []
        while not self.assistant.heard.empty():
            heard = self.assistant.heard.get()
            if heard.kind == "text":
                pieces.append(heard.text)
                continue
            if heard.kind == "note":
                self.status["text"] = heard.text
                continue
            self._write("".join(pieces))
            pieces.clear()
            if heard.kind == "done":
                self._write("\n")
            self._go("broken" if heard.kind == "failed" else "idle", "Send", heard.text)
        if pieces:
            self._write("".join(pieces))
            self.status["text"] = "answering…"
        self._timer = self.root.after(POLL_MS, self._poll)

    def _go(self, state: Literal["idle", "answering", "broken"], label: str, status: str) -> None:
        self.state = state
        self.button["text"], self.status["text"] = label, status
        self.button.state(["disabled" if state == "broken" else "!disabled"])

    def _write(self, text: str, tag: str = "") -> None:
        at_end = self.talk.yview()[1] == 1.0  # who scrolled up to read is left there
        self.talk["state"] = "normal"
        self.talk.insert("end", text, tag)
        self.talk["state"] = "disabled"
        if at_end:
            self.talk.see("end")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="A window to talk with a model.")
    parser.add_argument("model", help="a GGUF file")
    parser.add_argument("--memory", help="budget of the whole process, window included (default: what can be spared)")
    parser.add_argument("--context", type=int, help="tokens that question and answers may have together")
    asked = parser.parse_args(argv)
    root = tk.Tk()  # before the model: what the window takes is part of the budget
    assistant = Assistant(asked.model, asked.memory, asked.context)
    Window(root, assistant)
    root.mainloop()
    assistant.join()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
