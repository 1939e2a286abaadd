"""`edgelm chat`: loads the model and hands over to the conversation loop."""

from __future__ import annotations

import sys
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
    from edgelm.chat import Overflow


@click.command()
@model_argument(required=False)
@click.option("--system", metavar="TEXT", help="What the model is told before the conversation.")
@quiet_option
@offline_option
@engine_options
@speculation_options
@keeping_options
@adaptive_option
@sampling_options
def chat(model: str | None, system: str | None, quiet: bool, offline: bool, adaptive: bool, **given: Any) -> int:
    """Talk with a model.

    MODEL is a path or a name; without it, smollm2-135m-instruct.

    Ctrl-C stops an answer; Ctrl-D or /exit leaves; /help lists the commands.
    """
    from edgelm_apps.conversation import Conversation
    from edgelm_apps.engine import find_draft, find_model, open_model, start_lines
    from edgelm_apps.history import History, history_file
    from edgelm_apps.output import Asides, note
    from edgelm_apps.repl import Lines, talk
    from edgelm_models.catalogue import DEFAULT_MODEL

    keep = given.pop("keep_system")
    overflow: Overflow = given.pop("overflow") or "error"
    path = find_model(model or DEFAULT_MODEL, offline=offline, quiet=quiet)
    engine, asides = engine_values(given), Asides(quiet)
    find_draft(engine, offline=offline, quiet=quiet)
    if adaptive:
        engine["adaptive"] = asides.add
    with open_model(path, engine, quiet=quiet) as loaded:
        if not quiet:
            for line in start_lines(loaded):
                note(line)
            if loaded.template.notice:
                note(loaded.template.notice)
        interactive = sys.stdin.isatty() and sys.stdout.isatty()
        if interactive and not quiet:
            note("type a message; /help lists the commands, /exit leaves")
        source = Lines(History(history_file()) if interactive else None)
        try:
            return talk(Conversation(loaded, system, overflow, sampling_values(given), asides, keep), source)
        finally:
            source.close()
