"""`edgelm backends` and `doctor`: what can compute here, and what this machine is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from edgelm_apps.options import budget_options, json_option, model_argument

if TYPE_CHECKING:
    from edgelm import Candidate


@click.command()
@model_argument(required=False)
@budget_options
@click.option("--recheck", is_flag=True, help="Try every backend again, whatever is known.")
@json_option
def backends(model: str | None, recheck: bool, as_json: bool, **given: Any) -> None:
    """List the backends; with MODEL, say which is chosen for it, and why.

    With MODEL each backend that works is measured, in a process of its own. Speeds are predictions for one token after
    the other; memory is that of the whole process at its peak.
    """
    wanted = {key: value for key, value in given.items() if value is not None}
    if model is None and wanted:
        raise click.UsageError(f"--{next(iter(wanted))} needs a MODEL: without one, no backend is measured")
    if model is None:
        _list_backends(recheck, as_json)
    else:
        _list_candidates(model, recheck, as_json, wanted)


def _list_backends(recheck: bool, as_json: bool) -> None:
    import edgelm
    from edgelm_apps.output import humanize, plain, print_json, print_table

    reports = [plain(report) for report in edgelm.backends(recheck=recheck)]
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


def _list_candidates(model: str, recheck: bool, as_json: bool, wanted: dict[str, Any]) -> None:
    import edgelm
    from edgelm_apps.output import plain, print_json, print_table
    from edgelm_models.pull import locate

    path = locate(model)
    found = edgelm.candidates(path, recheck=recheck, **wanted)
    if as_json:
        print_json({"path": path, "candidates": plain(found)})
        return
    print_table(("backend", "tok/s", "memory", "from flash", "why"), [_candidate(one) for one in found])


def _candidate(one: Candidate) -> tuple[str, ...]:
    from edgelm.sizes import human

    speed = f"{one.predicted_decode_tps:.1f}" if one.predicted_decode_tps else "-"
    memory = human(one.planned_bytes) if one.planned_bytes else "-"
    flash = f"{human(one.streamed_bytes)} a token" if one.streamed_bytes else "-"
    why = one.reason
    if one.needed_bytes:
        memory = f"needs {human(one.needed_bytes)}"
    if one.loss and one.loss not in why:
        why += f"; {one.loss}"
    if one.prepare_bytes:
        why += f"; to be prepared once, {human(one.prepare_bytes)}"
    return one.name + (" (simulated)" if one.simulated else ""), speed, memory, flash, why


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
