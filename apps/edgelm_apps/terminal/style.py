"""How the screen looks: the 16 colours of the user's theme, so that it is readable on dark and on light."""

from __future__ import annotations

STYLES = {
    "user": "bold",
    "mark": "ansicyan",
    "note": "ansibrightblack",
    "error": "ansired",
    "status": "reverse",
    "heading": "bold",
    "heading.first": "bold underline",
    "strong": "bold",
    "em": "italic",
    "struck": "strike",
    "link": "underline",
    "rule": "ansibrightblack",
    "code.inline": "ansiyellow",
    "code.comment": "ansibrightblack",
    "code.keyword": "ansimagenta",
    "code.string": "ansigreen",
    "code.number": "ansicyan",
    "code.name": "ansiblue",
    "code.builtin": "ansicyan",
    "completion-menu": "noreverse",
    "completion-menu.completion": "reverse",
    "completion-menu.completion.current": "bold noreverse",
}
