"""`edgelm pack`: lay a model out for streaming, once."""

from __future__ import annotations

import os

import click

from edgelm_apps.options import json_option, model_argument, quiet_option


@click.command()
@model_argument()
@click.argument("output", required=False, type=click.Path())
@click.option("--force", is_flag=True, help="Replace OUTPUT if it exists.")
@quiet_option
@json_option
def pack(model: str, output: str | None, force: bool, quiet: bool, as_json: bool) -> None:
    """Write MODEL in the order in which it is read, with checksums and ready tokenizer tables.

    The pack is a GGUF file of the same weights, bit for bit. Without OUTPUT it is called NAME.edgelm.gguf: beside
    the file if MODEL is a path, in this folder if MODEL is a name. OUTPUT may be a folder.
    """
    import edgelm
    from edgelm.sizes import human
    from edgelm_apps.output import PullDisplay, print_json
    from edgelm_models.pull import locate

    path = locate(model)
    if output is None and not os.path.exists(os.path.expanduser(model)):
        output = "."
    display = PullDisplay(quiet)
    try:
        packed = edgelm.pack(
            path, output, force=force, progress=lambda done, total: display.progress("packing", done, total)
        )
    finally:
        display.close()
    if as_json:
        print_json(packed)
    elif not quiet:
        click.echo(f"{packed.path} ({human(packed.size_bytes)}, {packed.n_checksums} checksums)")
