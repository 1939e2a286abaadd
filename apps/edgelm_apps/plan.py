"""`edgelm plan`: where every megabyte would go, without loading the model."""

from __future__ import annotations

from typing import Any

import click

from edgelm_apps.options import (
    engine_options,
    engine_values,
    json_option,
    model_argument,
    parallel_option,
    speculation_options,
)


@click.command()
@model_argument()
@json_option
@engine_options
@speculation_options
@parallel_option
@click.option(
    "--published", is_flag=True, help="With --simulate: take the processor, too, from what others published of it."
)
def plan(model: str, as_json: bool, published: bool, **given: Any) -> None:
    """Show what stays, what streams and how fast, without loading."""
    import edgelm
    from edgelm_apps.output import print_json
    from edgelm_models.pull import locate

    engine = engine_values(given)
    if engine.get("draft", "auto") != "auto":
        engine["draft"] = locate(engine["draft"])
    made = edgelm.plan(locate(model), published=published, **engine)
    if as_json:
        print_json(made.as_dict())
    else:
        click.echo(str(made))
