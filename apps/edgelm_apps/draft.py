"""`edgelm draft`: a low-bit copy of a model, to guess tokens for it."""

from __future__ import annotations

import click

from edgelm_apps.options import json_option, model_argument, quiet_option


@click.command()
@model_argument()
@click.option(
    "--type",
    "kind",
    metavar="TYPE",
    help="Q4_0, or with llama.cpp's library Q2_K, Q3_K, IQ4_NL and others. [default: Q4_0]",
)
@quiet_option
@json_option
def draft(model: str, kind: str | None, quiet: bool, as_json: bool) -> None:
    """Make a low-bit copy of MODEL, a GGUF file, in the cache folder: `--draft auto` lets it guess tokens.

    Worth it for models whose weights are read from flash. `edgelm list` shows copies, `edgelm rm
    --drafts` removes them.
    """
    import edgelm
    from edgelm.sizes import human
    from edgelm_apps.output import PullDisplay, print_json
    from edgelm_models.pull import locate

    path = locate(model)
    display = PullDisplay(quiet)
    try:
        options = {"type": kind} if kind is not None else {}
        copy = edgelm.draft_copy(path, **options, progress=lambda done, total: display.progress("copying", done, total))
    finally:
        display.close()
    if as_json:
        print_json(copy._asdict())
    elif not quiet:
        there = "" if copy.made else ", made before"
        click.echo(f"{copy.path} ({human(copy.size_bytes)} of {human(copy.source_bytes)}, {copy.type}{there})")
