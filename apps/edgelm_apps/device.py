"""`edgelm backends` and `doctor`: what can compute here, and what this machine is."""

from __future__ import annotations

import click

from edgelm_apps.options import json_option


@click.command()
@json_option
def backends(as_json: bool) -> None:
    """List the backends, healthy or not, and why."""
    import edgelm
    from edgelm_apps.output import humanize, plain, print_json, print_table

    reports = [plain(report) for report in edgelm.backends()]
    if as_json:
        print_json({"backends": reports})
        return
    rows = [
        (
            report["name"],
            report["version"] or "-",
            "yes" if report["available"] else "no",
            report["reason"] or _capabilities(report["capabilities"], humanize),
        )
        for report in reports
    ]
    print_table(("backend", "version", "works", "notes"), rows)


@click.command()
@click.option("--recheck", is_flag=True, help="Try every backend again, whatever came of it before.")
@json_option
def doctor(recheck: bool, as_json: bool) -> None:
    """Describe this device: cores, memory, flash speed."""
    import edgelm
    from edgelm_apps.output import plain, print_facts, print_json

    facts = plain(edgelm.doctor(recheck=recheck))
    if as_json:
        print_json(facts)
        return
    warnings = facts.pop("warnings", [])
    print_facts(facts)
    for warning in warnings:
        click.echo(f"warning: {warning}")


def _capabilities(capabilities: object, humanize: object) -> str:
    assert callable(humanize)
    if not isinstance(capabilities, dict):
        return str(capabilities or "")
    return "; ".join(f"{key.replace('_', ' ')}: {humanize(key, value)}" for key, value in capabilities.items())
