"""`edgelm pi` and its subcommands: they parse, call one function, print."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from edgelm_apps.options import json_option, model_argument, offline_option, quiet_option, size_options
from edgelm_apps.pi.target import pi_devices

_BOARDS = list(pi_devices())
_simulate = click.option(
    "--simulate",
    type=click.Choice(_BOARDS),
    help="Show it on another machine: with that board's flash, budget and threads. Processor, memory speed and heat "
    "stay this machine's.",
)
_backend = click.option("--backend", metavar="NAME", help="What computes. [default: the fastest healthy one]")
_again = click.option("--again", is_flag=True, help="Do everything anew, whatever was found before.")


@click.group()
def pi() -> None:
    """Everything for the Raspberry Pi: prepare a model, a demo, what to expect, a service.

    Without a board, --simulate shows it on any machine; whatever is simulated is called so.
    """


@pi.command()
@model_argument(required=False)
@click.option("--system", metavar="TEXT", help="What the model is told before the conversation.")
@click.option("--plain", is_flag=True, help="Talk in lines, without the full screen: as on a pipe or a dumb terminal.")
@_simulate
@size_options
@_backend
@_again
@quiet_option
@offline_option
def demo(model: str | None, system: str | None, plain: bool, simulate: str | None, quiet: bool, **given: Any) -> int:
    """Prepare MODEL for this board, then chat on the full screen, with tokens a second, memory, flash and heat.

    MODEL is a path or a name; without it, smollm2-135m-instruct. What was prepared before is used again; who breaks
    off goes on from there.
    """
    from edgelm_apps.pi.demo import run_demo

    prepared, target = _prepare(model, simulate, quiet, given)
    return run_demo(prepared, target, system, {}, plain=plain, quiet=quiet)


@pi.command()
@model_argument(required=False)
@_simulate
@size_options
@_backend
@_again
@json_option
@quiet_option
@offline_option
def prepare(model: str | None, simulate: str | None, as_json: bool, quiet: bool, **given: Any) -> None:
    """Do all that the demo does before it talks: flash, budget, backend, pack, and a measurement."""
    from edgelm_apps.output import print_json

    prepared, _ = _prepare(model, simulate, quiet, given)
    if as_json:
        print_json(prepared.facts)


@pi.command()
@_simulate
@json_option
def board(simulate: str | None, as_json: bool) -> None:
    """Say which board this is, what its flash is on, how warm it is, and what is set up badly."""
    from edgelm_apps.output import print_json
    from edgelm_apps.pi.board import warnings
    from edgelm_apps.pi.target import find_target
    from edgelm_apps.pi.vitals import Vitals, read_vitals
    from edgelm_models.cache import cache_dir

    target = find_target(simulate, cache_dir())
    vitals = read_vitals(target.root) if target.board else Vitals(None, None)
    advice = [vitals.throttling.advice] if vitals.throttling and vitals.throttling.advice else []
    found = [*advice, *(warnings(target.root) if target.board else [])]
    if as_json:
        print_json({**target.facts(), "vitals": vitals, "warnings": found})
        return
    for line in target.lines():
        click.echo(line)
    if vitals.segments():
        click.echo(f"now: {', '.join(vitals.segments())}")
    for line in found:
        click.echo(f"warning: {line}")


@pi.command()
@model_argument(required=False)
@click.option("--memory", metavar="SIZES", help="Budgets, as in 100MB,200MB. [default: some that differ]")
@click.option("--board", "boards", multiple=True, type=click.Choice(_BOARDS), help="Only this board. Repeatable.")
@click.option(
    "--context", type=click.IntRange(min=1), default=1024, show_default=True, help="Tokens of prompt and answer."
)
@json_option
@offline_option
def expect(
    model: str | None, memory: str | None, boards: tuple[str, ...], context: int, as_json: bool, offline: bool
) -> None:
    """Predict what MODEL would do on a Raspberry Pi 4 and 5, by budget and flash.

    Predictions by the planner from published figures, never measurements; the sources are named.
    """
    from edgelm.sizes import parse_size
    from edgelm_apps.output import print_json, print_table
    from edgelm_apps.pi import expect as expecting

    path = _find(model, offline, quiet=as_json)
    budgets = sorted({parse_size(size) for size in memory.split(",")}) if memory else []
    rows = expecting.expected(path, boards or _BOARDS, budgets, expecting.usable_backend(), context)
    if as_json:
        print_json(expecting.as_dict(path, rows, context))
        return
    click.echo(f"{path.name}, context {context}: {expecting.LABEL}\n")
    print_table(expecting.COLUMNS, [row.cells() for row in rows])
    click.echo()
    for line in expecting.notes(rows):
        click.echo(line)


@pi.command()
@model_argument(required=False)
@click.option("--port", type=click.IntRange(1, 65535), default=8080, show_default=True, help="Port to listen on.")
@click.option("--memory", metavar="SIZE", default="300MB", show_default=True, help="Budget of the whole process.")
@click.option("--context", type=click.IntRange(min=1), help="Tokens that prompt and answer may have.")
@_backend
@click.option("--print", "only_print", is_flag=True, help="Print the unit and write nothing.")
@click.option("--uninstall", "removes", is_flag=True, help="Stop the service and remove its unit.")
def service(
    model: str | None, port: int, memory: str, only_print: bool, removes: bool, context: int | None, backend: str | None
) -> None:
    """Write a systemd unit of the user that serves MODEL, with the budget as its memory limit; no root.

    The limit (MemoryMax) is the budget and 64 MB for what the kernel counts beside it. Starting it is left to you.
    """
    import os

    from edgelm.sizes import parse_size
    from edgelm_apps.output import note
    from edgelm_apps.pi import service as unit
    from edgelm_apps.pi.board import memory_limits
    from edgelm_models.catalogue import DEFAULT_MODEL

    if removes:
        gone = unit.uninstall()
        note(f"removed {gone}" if gone else f"there is no {unit.unit_path()}: nothing to remove")
        return
    named = model or DEFAULT_MODEL
    path = Path(named).expanduser()
    options = {"port": port, "context": context, "backend": backend}
    text = unit.unit_text(
        str(path.resolve()) if path.exists() else named,
        {name: value for name, value in options.items() if value is not None},
        parse_size(memory),
        os.environ,
    )
    if only_print:
        click.echo(text, nl=False)
        return
    written, verdict = unit.install(text)
    note(f"wrote {written}; {verdict}")
    if not memory_limits():
        note("the kernel keeps no memory limits here, so MemoryMax is ignored; the budget holds all the same")
    note(f"start it: systemctl --user daemon-reload && systemctl --user enable --now {unit.NAME}")
    note("for a start with the board, without anybody's login: loginctl enable-linger")


def _find(model: str | None, offline: bool, quiet: bool) -> Path:
    from edgelm_apps.engine import find_model
    from edgelm_models.catalogue import DEFAULT_MODEL

    return find_model(model or DEFAULT_MODEL, offline=offline, quiet=quiet)


def _prepare(model: str | None, simulate: str | None, quiet: bool, given: dict[str, Any]) -> Any:
    """Return what is prepared, and for what."""
    from edgelm_apps.output import note
    from edgelm_apps.pi.preparing import prepare as do
    from edgelm_apps.pi.target import find_target
    from edgelm_models.cache import cache_dir

    again, offline = given.pop("again"), given.pop("offline")
    target = find_target(simulate, cache_dir())  # before anything is fetched
    path = _find(model, offline, quiet)
    asked = {name: value for name, value in given.items() if value is not None}
    return do(path, target, asked, (lambda _: None) if quiet else note, again), target
