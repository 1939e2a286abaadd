"""Puts a profile into one HTML page that needs no network: text, tables and plotly's charts with its script inside."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from importlib.resources import files
from typing import Any

from edgelm.errors import EdgeLMError
from edgelm.sizes import human
from edgelm_apps.profiling import figures, readings
from edgelm_apps.profiling.split import mean
from edgelm_apps.profiling.sweep import Profile, Run


class PlottingUnavailable(EdgeLMError):
    """The page needs plotly, which is an extra."""


def need_plotly() -> None:
    """Raise `PlottingUnavailable` where the page could not be made; asked before anything is measured."""
    if importlib.util.find_spec("plotly") is None:
        raise PlottingUnavailable(
            "the page is drawn with plotly, which is not installed; "
            "pip install 'edgelm[profile]', or write the figures with --json FILE"
        )


def render(profile: Profile) -> str:
    """Return the page."""
    from jinja2 import Environment, StrictUndefined
    from plotly.offline import get_plotlyjs

    template = files("edgelm_apps.profiling").joinpath("page.html.j2").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["human"] = human
    chosen = _most_telling(profile)
    return environment.from_string(template).render(
        profile=profile,
        device=_device(profile),
        notes=list(dict.fromkeys(note for run in profile.runs for note in run.notes)),
        charts=_charts(profile, chosen),
        names=[readings.named(run) for run in profile.runs],
        chosen=chosen,
        figures=_embedded(_figures(profile)),
        script=get_plotlyjs(),
        rows=[_row(run) for run in profile.runs],
        items=[(readings.named(run), run.plan["items"]) for run in profile.runs],
    )


def _charts(profile: Profile, chosen: int) -> list[dict[str, Any]]:
    run = profile.runs[chosen]
    return [
        _chart("speed", "Speed against budget", readings.speed(profile), False),
        _chart("memory", "Memory over time", readings.memory(profile), False),
        _chart("split", "What a token's time goes into", readings.split(profile), False),
        _chart("tokens", "Token by token", readings.token_by_token(run), True),
        _chart("units", "A few tokens, unit by unit", readings.units(run), True),
        _chart("bytes", "Where every byte lives", readings.where(profile), False),
    ]


def _chart(name: str, title: str, reading: str, by_run: bool) -> dict[str, Any]:
    return {"name": name, "title": title, "reading": reading, "by_run": by_run}


def _figures(profile: Profile) -> dict[str, list[dict[str, Any]]]:
    """Return what the page's script draws: for each chart one figure, or one for every run."""
    whole: dict[str, Callable[[Profile], Any]] = {
        "speed": figures.speed, "memory": figures.memory, "split": figures.split, "bytes": figures.bytes_by_item,
    }  # fmt: skip
    by_run: dict[str, tuple[Callable[[Run], Any], Callable[[Run], str]]] = {
        "tokens": (figures.token_by_token, readings.token_by_token), "units": (figures.units, readings.units),
    }  # fmt: skip
    drawn = {name: [{"figure": json.loads(draw(profile).to_json())}] for name, draw in whole.items()}
    for name, (draw_run, read) in by_run.items():
        drawn[name] = [{"figure": json.loads(draw_run(run).to_json()), "reading": read(run)} for run in profile.runs]
    return drawn


def _embedded(value: object) -> str:
    """Return JSON that a script element can hold, whatever is in it."""
    return json.dumps(value, separators=(",", ":")).replace("<", "\\u003c")


def _most_telling(profile: Profile) -> int:
    """Return the run that the charts of one run show first: the largest budget that still streams."""
    streaming = [i for i, run in enumerate(profile.runs) if run.plan["streamed_bytes_per_pass"]]
    return streaming[-1] if streaming else len(profile.runs) - 1


def _device(profile: Profile) -> list[tuple[str, str]]:
    device, run = profile.device, profile.runs[0]
    flash = device["flash"]
    speed = f"{human(flash['read_bytes_per_s'])}/s, {flash['how']}" if "how" in flash else flash["problem"]
    return [
        ("processor", f"{device['cpu']}, {device['threads']} threads"),
        ("flash", speed),
        ("backend", f"{run.backend} {device['backend_versions'].get(run.backend) or ''}".strip()),
        ("software", f"edgelm {device['edgelm']}, Python {device['python']}, {device['platform']}"),
        ("date", device["date"]),
        ("workload", f"{profile.prompt_tokens} tokens of prompt, {profile.n_tokens} of answer, at each budget"),
        ("options", ", ".join(f"{name} {value}" for name, value in profile.engine.items())),
    ]


def _row(run: Run) -> list[tuple[str, str]]:
    usage, plan, token = run.usage, run.plan, mean(run.tokens)
    flash = f"{human(usage['bytes_streamed'] / usage['read_s'])}/s" if usage["read_s"] else "not read"
    return [
        ("budget", human(run.budget_bytes)),
        ("peak", human(usage["peak_bytes"])),
        ("context", str(plan["context"])),
        ("prompt passes", str(plan["chunk"])),
        ("decode tok/s", f"{usage['decode_tps']:.3g}"),
        ("predicted tok/s", f"{plan['predicted_decode_tps']:.3g}"),
        ("prompt tok/s", f"{usage['prefill_tps']:.3g}"),
        ("first token", f"{usage['ttft_s']:.3g} s"),
        ("loading", f"{run.load_s:.3g} s"),
        ("streamed a pass", human(plan["streamed_bytes_per_pass"])),
        ("flash gave", flash),
        ("waiting", f"{1000 * token.wait_s:.3g} ms"),
        ("computing", f"{1000 * token.compute_s:.3g} ms"),
        ("sampling", f"{1000 * token.sample_s:.3g} ms"),
        ("other", f"{1000 * token.other_s:.3g} ms"),
        ("events lost", str(run.events_dropped)),
    ]
