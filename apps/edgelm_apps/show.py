"""`edgelm show`: what a model file says about itself."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import click

from edgelm_apps.options import json_option, model_argument

if TYPE_CHECKING:
    from edgelm import Inspection


@click.command()
@model_argument()
@click.option("--tensors", is_flag=True, help="List every tensor: name, type, shape, bytes.")
@json_option
def show(model: str, tensors: bool, as_json: bool) -> None:
    """Show metadata, tensors and template of MODEL."""
    import edgelm
    from edgelm_apps.output import print_json
    from edgelm_models.pull import locate

    path = locate(model)
    found = edgelm.inspect(path)
    if as_json:
        print_json({"path": path, **_facts(found, tensors)})
    else:
        _print(str(path), found, tensors)


def _by_type(found: Inspection) -> list[tuple[str, int, int]]:
    counts: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    for tensor in found.tensors:
        counts[tensor.type] += 1
        sizes[tensor.type] += tensor.size_bytes
    return [(kind, counts[kind], n_bytes) for kind, n_bytes in sizes.most_common()]


def _facts(found: Inspection, tensors: bool) -> dict[str, Any]:
    from edgelm_apps.output import brief

    facts: dict[str, Any] = {
        "architecture": found.architecture,
        "metadata": {key: brief(value) for key, value in found.metadata.items()},
        "tensor_types": [{"type": kind, "count": count, "size_bytes": size} for kind, count, size in _by_type(found)],
        "template": found.template,
    }
    if tensors:
        facts["tensors"] = [
            {"name": t.name, "type": t.type, "shape": list(t.shape), "size_bytes": t.size_bytes} for t in found.tensors
        ]
    return facts


def _print(path: str, found: Inspection, tensors: bool) -> None:
    from edgelm.sizes import human
    from edgelm_apps.output import brief, print_table

    click.echo(f"{path}\narchitecture: {found.architecture}")
    if (version := found.metadata.get("edgelm.pack.version")) is not None:
        click.echo(f"a pack (version {version}) of {found.metadata.get('edgelm.pack.source', 'an unknown file')}")
    click.echo()
    rows = [(kind, str(count), human(size)) for kind, count, size in _by_type(found)]
    print_table(("type", "tensors", "size"), rows)
    if tensors:
        click.echo()
        listed = [(t.name, t.type, "x".join(map(str, t.shape)), human(t.size_bytes)) for t in found.tensors]
        print_table(("tensor", "type", "shape", "size"), listed)
    click.echo()
    for key, value in found.metadata.items():
        shown = brief(value)
        if isinstance(shown, dict):
            shown = f"{shown['length']} values, first {shown['first']}"
        if not key.endswith("chat_template"):
            click.echo(f"{key} = {shown}")
    click.echo(f"\nchat template:\n{found.template}" if found.template else "\nchat template: none")
