"""`edgelm score`: how likely a model finds a text."""

from __future__ import annotations

from typing import Any

import click

from edgelm_apps.options import (
    engine_options,
    engine_values,
    json_option,
    model_argument,
    offline_option,
    quiet_option,
)


@click.command()
@model_argument()
@click.argument("text")
@click.option(
    "--continuation",
    multiple=True,
    metavar="TEXT",
    help="Score this after TEXT, instead of TEXT itself. Repeatable: the likeliest comes first.",
)
@json_option
@quiet_option
@offline_option
@engine_options
def score(
    model: str, text: str, continuation: tuple[str, ...], as_json: bool, quiet: bool, offline: bool, **given: Any
) -> int:
    """Say how likely a model finds TEXT: its log-probability, and its perplexity.

    Several continuations share what is computed for TEXT.
    """
    from edgelm_apps.engine import find_model, open_model
    from edgelm_apps.output import print_json

    path = find_model(model, offline=offline, quiet=quiet)
    with open_model(path, engine_values(given), quiet=quiet) as loaded:
        found = [(one, loaded.score(text, one)) for one in continuation or ("",)]
    found.sort(key=lambda pair: -pair[1].total)
    if as_json:
        rows = [
            {
                "text": one or text,
                "logprob": scored.total,
                "perplexity": scored.perplexity,
                "token_ids": list(scored.token_ids),
                "logprobs": list(scored.logprobs),
            }
            for one, scored in found
        ]
        print_json({"scores": rows})
        return 0
    for one, scored in found:
        figures = f"{scored.total:10.3f}  perplexity {scored.perplexity:8.2f}  {len(scored.token_ids):4} tokens"
        click.echo(f"{figures}  {one or text!r}")
    return 0
