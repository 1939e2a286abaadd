"""`edgelm verify`: how close every backend comes to the oracle on a model, as tables or JSON."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgelm_apps.options import json_option, model_argument, offline_option, quiet_option

if TYPE_CHECKING:
    from tqdm import tqdm

EXIT_OUTSIDE = 11
POSITIONS = 2000


@click.command()
@model_argument()
@click.option(
    "--backend",
    "backends",
    multiple=True,
    metavar="NAME",
    help="Compare this one. Repeatable. [default: all that work]",
)
@click.option(
    "--positions",
    type=click.IntRange(min=1),
    metavar="N",
    help=f"Tokens of the text to measure. [default: {POSITIONS}]",
)
@click.option(
    "--perplexity", is_flag=False, flag_value="", metavar="[FILE]",
    help="Measure all of a text, FILE if you name one, to the end unless --positions says less.",
)  # fmt: skip
@click.option(
    "--memory", metavar="SIZE", help="Budget of each process: 300MB, 1GiB. [default: what the device can spare]"
)
@click.option("--threads", type=click.IntRange(min=1), help="Computing threads. [default: free physical cores]")
@click.option(
    "--context", type=click.IntRange(min=1), help="Tokens that are read from an empty cache. [default: up to 1024]"
)
@json_option
@quiet_option
@offline_option
def verify(
    model: str, backends: tuple[str, ...], perplexity: str | None, positions: int | None, as_json: bool,
    quiet: bool, offline: bool, **given: Any,
) -> None:  # fmt: skip
    """Compare the backends that work here with the oracle, the NumPy backend, on MODEL.

    Every backend reads the same text beside the oracle, in a process of its own. Exit code 11 says that one of them
    lies outside its tolerance or failed, or that there was none to compare.
    """
    import edgelm
    from edgelm_apps.engine import find_model
    from edgelm_apps.output import print_json

    if positions is None and perplexity is None:
        positions = POSITIONS
    path = find_model(model, offline=offline, quiet=quiet)
    with _Bar(quiet) as bar:
        found = edgelm.verify(
            path,
            backends=backends or None,
            text=Path(perplexity) if perplexity else None,
            positions=positions,
            progress=bar.show,
            **given,
        )
    if as_json:
        print_json(found.as_dict())
    else:
        click.echo(found.markdown())
    if not found.passed:
        click.get_current_context().exit(EXIT_OUTSIDE)


class _Bar:
    """A bar over rows of logits, on terminals only."""

    def __init__(self, quiet: bool) -> None:
        import sys

        self._shows = not quiet and sys.stderr.isatty()
        self._bar: tqdm[Any] | None = None

    def show(self, done: int, total: int) -> None:
        if not self._shows:
            return
        if self._bar is None:
            from tqdm import tqdm

            self._bar = tqdm(desc="verifying", total=total, unit=" rows", leave=False)
        self._bar.update(done - self._bar.n)

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.close()
