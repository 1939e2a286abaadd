"""`edgelm chat`: loads the model and hands over to the conversation, on the full screen or in lines."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from edgelm_apps.options import (
    adaptive_option,
    engine_options,
    engine_values,
    keeping_options,
    model_argument,
    offline_option,
    quiet_option,
    sampling_options,
    sampling_values,
    speculation_options,
)

if TYPE_CHECKING:
    from pathlib import Path

    from edgelm import Model
    from edgelm.chat import Overflow
    from edgelm_apps.conversation import Conversation
    from edgelm_apps.terminal.code import Colours
    from edgelm_apps.terminal.status import Segment


@click.command()
@model_argument(required=False)
@click.option("--system", metavar="TEXT", help="What the model is told before the conversation.")
@click.option("--plain", is_flag=True, help="Talk in lines, without the full screen: as on a pipe or a dumb terminal.")
@quiet_option
@offline_option
@engine_options
@speculation_options
@keeping_options
@adaptive_option
@sampling_options
def chat(
    model: str | None, system: str | None, plain: bool, quiet: bool, offline: bool, adaptive: bool, **given: Any
) -> int:
    """Talk with a model.

    MODEL is a path or a name; without it, smollm2-135m-instruct.

    Ctrl-C stops an answer; Ctrl-D or /exit leaves; /help lists the commands.
    """
    from edgelm_apps import terminal
    from edgelm_apps.conversation import Conversation
    from edgelm_apps.engine import find_draft, find_model, start_lines
    from edgelm_apps.output import Asides
    from edgelm_models.catalogue import DEFAULT_MODEL

    keep = given.pop("keep_system")
    overflow: Overflow = given.pop("overflow") or "error"
    path = find_model(model or DEFAULT_MODEL, offline=offline, quiet=quiet)
    engine, asides = engine_values(given), Asides(quiet)
    find_draft(engine, offline=offline, quiet=quiet)
    if adaptive:
        engine["adaptive"] = asides.add
    colours = terminal.prepare() if terminal.serves() and not plain else None
    with opened(path, engine, quiet=quiet, full=colours is not None) as loaded:
        conversation = Conversation(loaded, system, overflow, sampling_values(given), asides, keep)
        told = [] if quiet else [*start_lines(loaded), *filter(None, [loaded.template.notice])]
        if colours is not None:
            return on_screen(conversation, path, colours, told)
        return in_lines(conversation, told, greet=not quiet)


@contextmanager
def opened(path: Path, engine: dict[str, Any], *, quiet: bool, full: bool) -> Iterator[Model]:
    """Load the model; where the budget has no room for it beside the full screen, say that too."""
    from edgelm.errors import BudgetTooSmall
    from edgelm_apps.engine import open_model
    from edgelm_apps.output import note

    try:
        loaded = open_model(path, engine, quiet=quiet)
    except BudgetTooSmall:
        if full and not quiet:
            note("the full screen takes part of the budget; --plain needs less")
        raise
    with loaded:
        yield loaded


def on_screen(
    conversation: Conversation,
    path: Path,
    colours: Colours,
    told: list[str],
    segments: Sequence[Segment] | None = None,
) -> int:
    """Talk on the full screen; `told` is said before, `segments` are those of the status line if not the usual ones."""
    from edgelm_apps.history import History, history_file
    from edgelm_apps.terminal.status import SEGMENTS
    from edgelm_apps.terminal.talk import Talk

    talk = Talk(conversation, path.stem, colours, History(history_file()), segments or SEGMENTS)
    for line in told:
        talk.note(line)
    if told:
        talk.note("type a message; /help lists commands and keys, Ctrl-D leaves")
    return talk.run()


def in_lines(conversation: Conversation, told: list[str], *, greet: bool) -> int:
    """Talk in lines; `told` is said before."""
    from edgelm_apps.history import History, history_file
    from edgelm_apps.output import note
    from edgelm_apps.repl import Lines, talk

    for line in told:
        note(line)
    interactive = sys.stdin.isatty() and sys.stdout.isatty()
    if interactive and greet:
        note("type a message; /help lists the commands, /exit leaves")
    source = Lines(History(history_file()) if interactive else None)
    try:
        return talk(conversation, source)
    finally:
        source.close()
