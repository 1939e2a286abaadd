"""`edgelm backends` and `doctor`: what can compute here, and what this machine is."""

from __future__ import annotations

from typing import Any

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
@click.option("--recheck", is_flag=True, help="Try every backend and measure the flash again, whatever is known.")
@json_option
def doctor(recheck: bool, as_json: bool) -> None:
    """Describe this device: cores, memory, flash speed."""
    import edgelm
    from edgelm_apps.output import plain, print_facts, print_json

    facts = plain(edgelm.doctor(recheck=recheck))
    if as_json:
        print_json(facts)
        return
    warnings, table = facts.pop("warnings", []), facts["flash"].pop("table", [])
    print_facts(facts)
    _print_flash(table)
    for warning in warnings:
        click.echo(f"warning: {warning}")


def _print_flash(turns: list[dict[str, Any]]) -> None:
    """Print what the flash gave, a line for each block size and a column for each number of reads in flight."""
    from edgelm_apps.output import print_table

    for how in dict.fromkeys(turn["how"] for turn in turns):
        cells = {
            (turn["block_bytes"], turn["n_parallel"]): f"{turn['bytes_per_s'] / 1e6:.0f} ({turn['cpu_s_per_gb']:.2g})"
            for turn in turns
            if turn["how"] == how
        }
        blocks, parallel = (sorted({key[i] for key in cells}) for i in (0, 1))
        click.echo(f"\nflash, {how}: MB/s (CPU seconds per GB) by block size and reads in flight")
        rows = [(f"{block >> 10} KiB", *(cells.get((block, n), "") for n in parallel)) for block in blocks]
        print_table(("block", *map(str, parallel)), rows)


def _capabilities(capabilities: object, humanize: object) -> str:
    assert callable(humanize)
    if not isinstance(capabilities, dict):
        return str(capabilities or "")
    return "; ".join(f"{key.replace('_', ' ')}: {humanize(key, value)}" for key, value in capabilities.items())
