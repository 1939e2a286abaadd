"""What the keys of the screen do. Editing itself is prompt_toolkit's, with the keys of Emacs and readline."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from prompt_toolkit.filters import has_completions, has_focus
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

if TYPE_CHECKING:
    from prompt_toolkit.buffer import Buffer

HELP = """\
Enter sends; Alt-Enter, Ctrl-J or a \\ at the end begins another line. Pasted lines stay one message.
Up and Ctrl-R find earlier messages; Tab completes commands. You may write on while an answer comes.
PageUp and PageDown scroll, Ctrl-Up and Ctrl-Down by a line. Select text with the mouse as anywhere.
Ctrl-C stops an answer; twice, or Ctrl-D, leaves."""


class Keyed(Protocol):
    """What keys act upon."""

    def send(self, text: str) -> None:
        """A message or a command was typed."""

    def interrupt(self) -> None:
        """Ctrl-C was typed, and there is no text that it would throw away."""

    def leave(self) -> None: ...

    def scroll(self, n_lines: int) -> None: ...

    def scroll_pages(self, n_pages: float) -> None: ...


def bindings(buffer: Buffer, keyed: Keyed) -> KeyBindings:
    keys = KeyBindings()
    writing = has_focus(buffer)

    @keys.add("enter", filter=writing)
    def _send(event: KeyPressEvent) -> None:
        text = buffer.text
        if text.endswith("\\") and buffer.document.is_cursor_at_the_end:
            buffer.delete_before_cursor()
            buffer.insert_text("\n")
        elif text.strip():
            buffer.reset(append_to_history=True)
            keyed.send(text.rstrip("\n"))  # what is pasted often ends with one

    @keys.add("escape", "enter", filter=writing)
    @keys.add("c-j", filter=writing)
    def _new_line(event: KeyPressEvent) -> None:
        buffer.insert_text("\n")

    @keys.add("c-c", filter=writing)
    @keys.add("<sigint>")
    def _interrupt(event: KeyPressEvent) -> None:
        keyed.interrupt()

    @keys.add("c-d", filter=writing)
    def _leave(event: KeyPressEvent) -> None:
        if buffer.text:
            buffer.delete()
        else:
            keyed.leave()

    @keys.add("tab", filter=writing & ~has_completions)
    def _complete(event: KeyPressEvent) -> None:
        buffer.start_completion(insert_common_part=True)

    @keys.add("c-z", filter=writing)
    def _suspend(event: KeyPressEvent) -> None:
        event.app.suspend_to_background()

    for name, n_lines in {"c-up": -1, "c-down": 1, "s-up": -1, "s-down": 1}.items():

        @keys.add(name)
        def _scroll(event: KeyPressEvent, n_lines: int = n_lines) -> None:
            keyed.scroll(n_lines)

    for name, n_pages in {"pageup": -0.9, "pagedown": 0.9, "c-home": -1e9, "c-end": 1e9}.items():

        @keys.add(name)
        def _page(event: KeyPressEvent, n_pages: float = n_pages) -> None:
            keyed.scroll_pages(n_pages)

    return keys
