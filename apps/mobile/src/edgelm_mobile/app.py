"""One screen to talk with a model. Toga's event loop is asyncio's, so answers come by `async for`.

The model is `model.gguf` in the application's data folder, or else among its resources. On a phone the budget is small
and adaptive: what the system wants back it gets, and the answer goes on.
"""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import toga

import edgelm

MODEL = "model.gguf"
MEMORY, CONTEXT = "300MB", 1024


class Demo(toga.App):
    """The application. `answering` is the task of the answer that is being made, if there is one."""

    def startup(self) -> None:
        self.model: edgelm.Model | None = None
        self.chat: edgelm.Chat | None = None
        self.answering: asyncio.Task[None] | None = None
        self.talk = toga.MultilineTextInput(readonly=True, flex=1)
        self.entry = toga.TextInput(placeholder="Ask something", flex=1)
        self.entry.on_confirm = self.send  # type: ignore[assignment]  # Toga awaits it
        self.button = toga.Button("Send", on_press=self.press, enabled=False)
        self.status = toga.Label("loading the model…")
        line = toga.Box(children=[self.entry, self.button], direction="row", gap=6)
        content = toga.Box(children=[self.talk, line, self.status], direction="column", gap=6, margin=8)
        window = toga.MainWindow(title=self.formal_name, content=content)  # type: ignore[no-untyped-call]
        self.main_window = window
        window.show()

    async def on_running(self) -> None:  # type: ignore[override]  # Toga awaits it
        """Load the model beside the event loop: the screen is there at once."""
        os.environ.setdefault("EDGELM_CACHE", str(self.paths.cache))  # phones have no home folder to keep things in
        try:
            self.model = await asyncio.to_thread(
                edgelm.load, self.model_path(), memory=MEMORY, context=CONTEXT, adaptive=True
            )
        except edgelm.EdgeLMError as error:
            self.status.text = str(error)
            return
        self.chat = self.model.chat(overflow="trim")
        self.button.enabled = True
        self.status.text = f"{self.model.backend}, {self.model.plan.budget_bytes / 1e6:.0f} MB"

    def model_path(self) -> Path:
        placed = Path(self.paths.data) / MODEL
        return placed if placed.exists() else Path(self.paths.app) / "resources" / MODEL

    async def press(self, widget: toga.Widget, **_: Any) -> None:
        """Send, or stop while an answer is made."""
        if self.answering is not None:
            self.answering.cancel()
        else:
            await self.send(widget)

    async def send(self, widget: toga.Widget, **_: Any) -> None:
        question = (self.entry.value or "").strip()
        if self.chat is None or self.answering is not None or not question:
            return
        self.entry.value, self.button.text = "", "Stop"
        self.talk.value += f"> {question}\n"
        self.answering = asyncio.create_task(self.answer(question))
        try:
            await self.answering
        except asyncio.CancelledError:
            self.status.text = "stopped"
        finally:
            self.talk.value += "\n"
            self.answering, self.button.text = None, "Send"

    async def answer(self, question: str) -> None:
        assert self.chat is not None
        try:
            async for chunk in self.chat.astream(question):
                self.talk.value += chunk.text
                self.talk.scroll_to_bottom()
        except edgelm.EdgeLMError as error:
            self.status.text = str(error)
        else:
            self.status.text = f"{chunk.usage.decode_tps:.1f} tokens a second"

    async def on_exit(self) -> bool:  # type: ignore[override]  # Toga awaits it
        """Give the memory back; a running answer is stopped."""
        if self.model is not None:
            await asyncio.to_thread(self.model.close)
            self.model = None
        return True


def main() -> Demo:
    return Demo("edgelm demo", "org.edgelm.edgelm_mobile")
