"""The screen: the conversation, the status line below it, and the lines where a message is written.

Draws with prompt_toolkit, in the thread that calls `run`; an answer comes from another. Pieces of answers draw nothing:
while the model is busy a clock does, and so seldom that drawing takes a twentieth of one core at the most.
"""

from __future__ import annotations

import asyncio
import errno
import gc
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Protocol, TextIO

from prompt_toolkit.application import Application
from prompt_toolkit.data_structures import Point
from prompt_toolkit.filters import Condition
from prompt_toolkit.formatted_text import FormattedText, StyleAndTextTuples
from prompt_toolkit.input import Input, create_input
from prompt_toolkit.layout import (
    BufferControl,
    CompletionsMenu,
    Dimension,
    Float,
    FloatContainer,
    FormattedTextControl,
    HSplit,
    Layout,
    UIContent,
    UIControl,
    Window,
)  # fmt: skip
from prompt_toolkit.mouse_events import MouseEvent, MouseEventType
from prompt_toolkit.output import Output, create_output
from prompt_toolkit.shortcuts import print_formatted_text
from prompt_toolkit.styles import Style
from prompt_toolkit.widgets import SearchToolbar

from edgelm_apps.history import History
from edgelm_apps.terminal.editor import Values, editor
from edgelm_apps.terminal.keys import bindings
from edgelm_apps.terminal.lines import Line
from edgelm_apps.terminal.status import Segment, Status, status_text
from edgelm_apps.terminal.style import STYLES
from edgelm_apps.terminal.view import View

FRAME_S, IDLE_S = 0.1, 2.0
"""Least time between two frames while an answer comes, and between two looks at memory and temperature otherwise."""
SHARE = 0.05
"""Of one core, what drawing may take while an answer comes."""
SWITCH_S = 0.0005
"""How long drawing may keep Python from the thread that computes: a pass of a small model takes 7 ms, a frame 2."""
WHEEL_LINES = 3
KEEP_WHEEL, RETURN_WHEEL = "\x1b[?1007l", "\x1b[?1007h"
"""Most terminals turn the wheel into Up and Down on a full screen, which would leaf through the history."""


class Listener(Protocol):
    """Who is behind the screen. Called in the screen's thread."""

    @property
    def busy(self) -> bool:
        """Whether something may change by itself."""

    def send(self, text: str) -> None:
        """A message or a command was typed."""

    def interrupt(self) -> bool:
        """Ctrl-C: stop what runs; return whether there was anything."""

    def status(self, scrolled: bool) -> Status:
        """Return what the status line speaks of."""

    def look(self) -> None:
        """A frame is about to be drawn: time to take in what came from elsewhere."""


class Screen:
    """The full screen. `mouse`: the wheel scrolls, and selecting needs Shift; else the mouse is the terminal's."""

    def __init__(
        self, view: View, listener: Listener, segments: Sequence[Segment], history: History, values: Values
    ) -> None:
        self._view, self._listener, self._segments = view, listener, segments
        self.mouse = False
        self._buffer = editor(history, values)
        self._app: Application[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._awake: asyncio.Event | None = None
        self._cost_s = 0.0
        self._height = 1

    def run(self, terminal: TextIO) -> None:
        """Draw on `terminal` until the user leaves; then the terminal is as it was."""
        output = create_output(stdout=terminal)
        output.write_raw(KEEP_WHEEL)
        sys.setswitchinterval(SWITCH_S)
        gc.collect()
        gc.freeze()  # what is there now stays: it need not be looked through after every frame
        with _until_closed():
            try:
                asyncio.run(self._live(create_input(), output))
            finally:
                output.write_raw(RETURN_WHEEL)
                output.flush()

    def refresh(self) -> None:
        """Something has changed; from any thread."""
        loop, awake = self._loop, self._awake
        if loop is not None and awake is not None:
            with suppress(RuntimeError):  # the loop has just ended
                loop.call_soon_threadsafe(awake.set)

    def send(self, text: str) -> None:
        self._view.to_end()
        self._listener.send(text)
        self.refresh()

    def interrupt(self) -> None:
        if self._buffer.text and not self._listener.busy:
            self._buffer.reset()
        elif not self._listener.interrupt():
            self.leave()
        self.refresh()

    def leave(self) -> None:
        """End `run`; from any thread."""
        if self._loop is not None:
            with suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._exit)

    def scroll(self, n_lines: int) -> None:
        self._view.scroll(n_lines)

    def scroll_pages(self, n_pages: float) -> None:
        if abs(n_pages) < 2:
            self.scroll(round(n_pages * self._height))
        elif n_pages > 0:
            self._view.to_end()
        else:
            self._view.to_beginning()

    async def _live(self, source: Input, output: Output) -> None:
        self._loop, self._awake = asyncio.get_running_loop(), asyncio.Event()
        self._app = self._application(source, output)
        for name in ("SIGTERM", "SIGHUP"):
            with suppress(NotImplementedError, AttributeError):
                self._loop.add_signal_handler(getattr(signal, name), self._exit)
        clock = asyncio.ensure_future(self._draw_by_the_clock())
        try:
            await self._app.run_async()
        finally:
            clock.cancel()
            self._loop = None

    def _exit(self) -> None:
        if self._app is not None and self._app.is_running and not self._app.is_done:
            self._app.exit()

    async def _draw_by_the_clock(self) -> None:
        assert self._app is not None
        assert self._awake is not None
        while True:
            self._listener.look()
            self._app.invalidate()
            if self._listener.busy:
                self._awake.clear()
                await asyncio.sleep(max(FRAME_S, self._cost_s * (1 / SHARE - 1)))
            else:
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._awake.wait(), IDLE_S)
                self._awake.clear()

    def _application(self, source: Input, output: Output) -> Application[None]:
        search = SearchToolbar(ignore_case=True)
        control = BufferControl(
            self._buffer, search_buffer_control=search.control, preview_search=True, focus_on_click=True
        )
        writing = Window(
            control, wrap_lines=True, dont_extend_height=True, get_line_prefix=_prefix, height=self._editor_height
        )
        status = Window(FormattedTextControl(self._status), height=1, style="class:status")
        conversation = Window(_Conversation(self._view, self._resized), wrap_lines=False)
        body = HSplit([conversation, status, search, writing])
        menu = Float(CompletionsMenu(max_height=8), xcursor=True, ycursor=True)
        application = Application[None](
            layout=Layout(FloatContainer(body, [menu]), focused_element=control),
            key_bindings=bindings(self._buffer, self),
            style=Style.from_dict(STYLES),
            mouse_support=Condition(lambda: self.mouse),
            full_screen=True,
            input=source,
            output=output,
        )
        application.ttimeoutlen = 0.05  # a lone Escape is soon known as one
        began = time.thread_time()

        def before(_: object) -> None:
            nonlocal began
            began = time.thread_time()

        def after(_: object) -> None:
            # A frame of prompt_toolkit is a cycle of up to 2 MB. Left to the collector's own rhythm, 16 of them
            # were there at a time: 18 MB of the budget in a terminal of 200x60, instead of 3.
            gc.collect()
            self._cost_s = time.thread_time() - began

        application.before_render += before
        application.after_render += after
        return application

    def _resized(self, height: int) -> None:
        self._height = height

    def _editor_height(self) -> Dimension:
        rows = self._app.output.get_size().rows if self._app is not None else 24
        return Dimension(min=1, max=max(rows // 3, 1))

    def _status(self) -> StyleAndTextTuples:
        assert self._app is not None
        width = self._app.output.get_size().columns
        return [("", " " + status_text(self._listener.status(not self._view.follows), self._segments, width - 2))]


class _Conversation(UIControl):
    """The lines in sight, as prompt_toolkit asks for them."""

    def __init__(self, view: View, resized: Callable[[int], None]) -> None:
        self._view, self._resized = view, resized

    def is_focusable(self) -> bool:
        return False

    def create_content(self, width: int, height: int) -> UIContent:
        self._resized(height)
        lines = self._view.in_sight(width, height)
        return UIContent(lambda i: list(lines[i]), len(lines), cursor_position=Point(0, 0), show_cursor=False)

    def mouse_handler(self, mouse_event: MouseEvent) -> object:
        match mouse_event.event_type:
            case MouseEventType.SCROLL_UP:
                self._view.scroll(-WHEEL_LINES)
            case MouseEventType.SCROLL_DOWN:
                self._view.scroll(WHEEL_LINES)
            case _:
                return NotImplemented
        return None


@contextmanager
def _until_closed() -> Iterator[None]:
    """End what is inside where the terminal was closed, as SIGHUP does: keys and pictures fail then."""
    try:
        yield
    except EOFError:
        pass
    except OSError as error:
        if error.errno != errno.EIO:
            raise


def _prefix(line: int, wrap: int) -> StyleAndTextTuples:
    return [("class:mark", "> " if not (line or wrap) else "  ")]


def print_lines(lines: Iterable[Line], terminal: TextIO) -> None:
    """Print lines as the screen shows them, for a terminal that goes on as one."""
    output, style = create_output(stdout=terminal), Style.from_dict(STYLES)
    for line in lines:
        print_formatted_text(FormattedText(line), style=style, output=output)
