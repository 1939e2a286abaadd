"""`edgelm embed`: texts as vectors, one JSON line each."""

from __future__ import annotations

import json
import sys
from typing import Any

import click

from edgelm_apps.options import engine_options, engine_values, model_argument, offline_option, quiet_option


@click.command()
@model_argument()
@click.argument("texts", nargs=-1, metavar="[TEXT]...")
@click.option(
    "--pooling",
    type=click.Choice(("mean", "cls", "last", "none")),
    help="How the vectors of tokens become one. [default: as the file says]",
)
@click.option("--no-normalize", "normalize", flag_value=False, default=True, help="Leave vectors as long as they are.")
@quiet_option
@offline_option
@engine_options
def embed(
    model: str,
    texts: tuple[str, ...],
    pooling: Any,
    normalize: bool,
    quiet: bool,
    offline: bool,
    **given: Any,
) -> int:
    """Print the vector of each TEXT, or of each line of standard input, as a line of JSON.

    With the pooling "none", a vector for each token.
    """
    from edgelm_apps.engine import find_model, open_model

    path = find_model(model, offline=offline, quiet=quiet)
    with open_model(path, engine_values(given), quiet=quiet) as loaded:
        for text in texts or (line.rstrip("\r\n") for line in sys.stdin):
            if pooling == "none":
                vectors = loaded.embed_tokens(text, normalize)
            else:
                vectors = loaded.embed([text], normalize, pooling=pooling)[0]
            click.echo(json.dumps({"text": text, "embedding": vectors.tolist()}, ensure_ascii=False))
    return 0
