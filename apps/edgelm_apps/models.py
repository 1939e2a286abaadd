"""`edgelm pull`, `list` and `rm`: the catalogue and the cache."""

from __future__ import annotations

import click

from edgelm_apps.options import json_option, model_argument, offline_option, quiet_option


@click.command()
@model_argument("name")
@json_option
@quiet_option
@offline_option
def pull(name: str, as_json: bool, quiet: bool, offline: bool) -> None:
    """Fetch a model into the cache and check it.

    NAME is one of `edgelm list`, or a hub's file: org/repo:QUANT, hf:org/repo/file.gguf.
    """
    from edgelm.sizes import human
    from edgelm_apps.output import PullDisplay, print_json
    from edgelm_models.pull import pull as pull_model

    display = PullDisplay(quiet)
    try:
        model = pull_model(name, offline=offline, observer=display)
    finally:
        display.close()
    if as_json:
        print_json(model)
    elif not quiet:
        click.echo(f"{model.name}: {model.file} ({human(model.size_bytes)}, sha256 checked)")


@click.command("list")
@json_option
def list_models(as_json: bool) -> None:
    """List the models here and in the catalogue, and what was made of them."""
    from edgelm.sizes import human
    from edgelm_apps.output import print_json, print_table
    from edgelm_models.cache import cache_dir
    from edgelm_models.listing import drafts, listing, prefixes, prepared

    models, files = listing(), [file._asdict() for file in prepared()]
    kept, copies = [prefix._asdict() for prefix in prefixes()], [copy._asdict() for copy in drafts()]
    if as_json:
        made = {"prepared": files, "prefixes": kept, "drafts": copies}
        print_json({"cache": cache_dir(), "models": models, **made})
        return
    rows = [
        (
            model.name,
            human(model.size_bytes),
            model.quantization,
            str(model.context or "?"),
            _age(model.last_used_s),
            model.file or f"not here: edgelm pull {model.name}",
        )
        for model in models
    ]
    print_table(("name", "size", "type", "context", "used", "where"), rows)
    if files:
        click.echo()
        parts = [
            (file["model"], human(file["size_bytes"]), file["backend"], _age(file["used_s"]), str(file["path"]))
            for file in files
        ]
        print_table(("prepared of", "size", "backend", "used", "where"), parts)
    if kept:
        click.echo()
        parts = [
            (one["model"], human(one["size_bytes"]), str(one["n_tokens"]), _age(one["used_s"]), str(one["path"]))
            for one in kept
        ]
        print_table(("system message of", "size", "tokens", "used", "where"), parts)
    if copies:
        click.echo()
        lines = [(copy["model"], human(copy["size_bytes"]), copy["type"], str(copy["path"])) for copy in copies]
        print_table(("low-bit copy of", "size", "type", "where"), lines)


@click.command()
@model_argument("name", required=False)
@click.option("--prepared", is_flag=True, help="Only what backends prepared of NAME (also a path), or of all models.")
@click.option("--prefixes", is_flag=True, help="Only the system messages and guesses kept of NAME, or of all.")
@click.option("--drafts", is_flag=True, help="Only the low-bit copies of NAME (also a path), or of all models.")
@quiet_option
def rm(name: str | None, prepared: bool, prefixes: bool, drafts: bool, quiet: bool) -> None:
    """Remove a pulled model and what was derived from it."""
    from edgelm.sizes import human
    from edgelm_models.cache import remove, remove_drafts, remove_prefixes, remove_prepared
    from edgelm_models.pull import locate

    if prefixes:
        what = f"what was kept of system messages and guesses of {name or 'all models'}"
        freed = remove_prefixes(locate(name) if name is not None else None)
    elif prepared:
        what = f"what was prepared of {name or 'all models'}"
        freed = remove_prepared(locate(name) if name is not None else None)
    elif drafts:
        what = f"every low-bit copy of {name or 'all models'}"
        freed = remove_drafts(locate(name) if name is not None else None)
    elif name is not None:
        what, freed = name, remove(name)
    else:
        raise click.UsageError(
            "name the model to remove, or clear what was made of models: --prepared, --prefixes, --drafts"
        )
    if not quiet:
        click.echo(f"{what} is removed: {human(freed)} are free again")


def _age(last_used_s: float | None) -> str:
    import time

    if last_used_s is None:
        return "-"
    age_s = max(0.0, time.time() - last_used_s)
    for unit_s, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if age_s >= unit_s:
            return f"{age_s / unit_s:.0f} {unit} ago"
    return "just now"
