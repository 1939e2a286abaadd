"""Draws a profile as plotly figures. Decides on marks and colours; the page decides on light and dark, and on size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from edgelm.sizes import MB, human
from edgelm_apps.profiling.readings import flash_bound, named
from edgelm_apps.profiling.split import Event, Token, lanes, mean
from edgelm_apps.profiling.sweep import Profile, Run

# Okabe and Ito's colours, told apart by nearly everyone
BLUE, ORANGE, GREEN, SKY, RED, PURPLE, YELLOW, GREY = (
    "#0072B2", "#E69F00", "#009E73", "#56B4E9", "#D55E00", "#CC79A7", "#F0E442", "#8C8C8C",
)  # fmt: skip
PARTS = (("wait_s", "waiting for flash", ORANGE), ("compute_s", "computing", BLUE), ("sample_s", "sampling", GREEN),
         ("other_s", "other", GREY))  # fmt: skip
RUN_COLOURS = (BLUE, ORANGE, GREEN, RED, SKY, PURPLE, GREY)
ITEM_COLOURS = (GREY, "#BFBFBF", GREEN, SKY, PURPLE, YELLOW, BLUE, ORANGE, "#E8E8E8", RED)


def speed(profile: Profile) -> Any:
    """Tokens a second against the budget: measured points, the predicted line, and the two bounds it is made of."""
    import plotly.graph_objects as go

    figure = _figure("budget, MB", "tokens a second")
    plans = profile.plans
    at = [plan["budget_bytes"] / MB for plan in plans]
    predicted = [plan["predicted_decode_tps"] for plan in plans]
    measured = [run.usage["decode_tps"] for run in profile.runs]
    top = 1.15 * max([*predicted, *measured])
    if at:
        flash = [value if value is not None and value <= top else None for value in flash_bound(plans)]
        for name, dash, values in (("compute alone", "dash", predicted[-1:] * len(at)), ("flash alone", "dot", flash)):
            if any(value is not None for value in values):
                line = {"color": GREY, "dash": dash}
                figure.add_trace(go.Scatter(x=at, y=values, name=name, mode="lines", line=line))
        figure.add_trace(go.Scatter(x=at, y=predicted, name="predicted", mode="lines", line={"color": ORANGE}))
    figure.add_trace(
        go.Scatter(
            x=[run.budget_bytes / MB for run in profile.runs],
            y=measured,
            name="measured",
            mode="markers",
            marker={"color": BLUE, "size": 11},
        )
    )
    figure.update_yaxes(range=[0, top])
    return figure


def memory(profile: Profile) -> Any:
    """Resident memory over time, a line for each budget, and the budget as a dotted line of the same colour."""
    import plotly.graph_objects as go

    figure = _figure("seconds since loading began", "MB resident")
    for i, run in enumerate(profile.runs):
        colour = RUN_COLOURS[i % len(RUN_COLOURS)]
        at = [at_s for at_s, _ in run.memory]
        label = human(run.budget_bytes)
        figure.add_trace(
            go.Scatter(x=at, y=[rss / MB for _, rss in run.memory], name=label, mode="lines", line={"color": colour})
        )
        budget = [run.budget_bytes / MB] * 2
        line = {"color": colour, "dash": "dot", "width": 1.5}
        ends = [min(at, default=0), max(at, default=0)]
        figure.add_trace(
            go.Scatter(x=ends, y=budget, mode="lines", line=line, showlegend=False, name=f"budget {label}")
        )
    figure.update_yaxes(rangemode="tozero")
    return figure


def split(profile: Profile) -> Any:
    """The average token at every budget, split into what it was spent on."""
    averages = [mean(run.tokens) for run in profile.runs]
    return _bars(_split_series(averages), _labels(profile), "ms a token")


def token_by_token(run: Run) -> Any:
    """Every token of one run, split."""
    import plotly.graph_objects as go

    figure = _figure("token", "ms")
    numbers = list(range(2, len(run.tokens) + 2))
    for name, colour, values in _split_series(run.tokens):
        figure.add_trace(go.Bar(x=numbers, y=values, name=name, marker={"color": colour, "line": {"width": 0}}))
    return figure.update_layout(barmode="stack", bargap=0.1)


def units(run: Run) -> Any:
    """A few tokens: reads on as many lanes as were busy at once, and what the computing thread did meanwhile."""
    import plotly.graph_objects as go

    figure = _figure("ms", "")
    of = {kind: [event for event in run.events if event.kind == kind] for kind in ("read", "wait", "compute", "sample")}
    placed = lanes(of["read"])
    n_lanes = max((lane for lane, _ in placed), default=-1) + 1
    rows = [f"flash {lane + 1}" for lane, _ in placed]
    series = [("read", "flash reads", SKY, [event for _, event in placed], rows)]
    for kind, (_, name, colour) in zip(("wait", "compute", "sample"), PARTS, strict=False):
        series.append((kind, name, colour, of[kind], ["compute"] * len(of[kind])))
    for kind, name, colour, events, rows in series:
        figure.add_trace(
            go.Bar(
                y=rows,
                x=[1000 * (event.end_s - event.begin_s) for event in events],
                base=[1000 * event.begin_s for event in events],
                text=[_told(event) for event in events],
                hovertemplate="%{text}<br>%{x:.2f} ms<extra></extra>",
                textposition="none",
                orientation="h",
                name=name,
                marker={"color": colour, "line": {"width": 0.5 if kind == "read" else 0, "color": "white"}},
            )
        )
    order = ["compute", *(f"flash {lane}" for lane in range(n_lanes, 0, -1))]
    figure.update_yaxes(categoryorder="array", categoryarray=order)
    for event in run.events:
        if event.kind == "token":
            figure.add_vline(x=1000 * event.end_s, line={"color": RED, "width": 1, "dash": "dot"})
    return figure.update_layout(barmode="overlay", bargap=0.15)


def bytes_by_item(profile: Profile) -> Any:
    """Where every byte of each budget goes, as planned; and the peak that was measured."""
    import plotly.graph_objects as go

    names = list(dict.fromkeys(name for run in profile.runs for name in run.plan["items"]))
    series = [
        (name, ITEM_COLOURS[i % len(ITEM_COLOURS)], [run.plan["items"].get(name, 0) / MB for run in profile.runs])
        for i, name in enumerate(names)
    ]
    figure = _bars(series, _labels(profile), "MB")
    peaks = [run.usage["peak_bytes"] / MB for run in profile.runs]
    marker = {"symbol": "line-ns", "size": 16, "line": {"width": 3, "color": RED}}
    return figure.add_trace(
        go.Scatter(x=peaks, y=_labels(profile), mode="markers", name="measured peak", marker=marker)
    )


def _labels(profile: Profile) -> list[str]:
    return [named(run) for run in profile.runs]


def _split_series(split: Sequence[Token]) -> list[tuple[str, str, list[float]]]:
    return [(name, colour, [1000 * getattr(token, key) for token in split]) for key, name, colour in PARTS]


def _bars(series: Sequence[tuple[str, str, list[float]]], labels: Sequence[str], title: str) -> Any:
    import plotly.graph_objects as go

    figure = _figure(title, "")
    for name, colour, values in series:
        figure.add_trace(go.Bar(y=labels, x=values, name=name, orientation="h", marker={"color": colour}))
    figure.update_yaxes(autorange="reversed", type="category")
    return figure.update_layout(barmode="stack", bargap=0.25)


def _figure(x_title: str, y_title: str) -> Any:
    import plotly.graph_objects as go

    return go.Figure(
        layout={
            "template": "none",
            "paper_bgcolor": "rgba(0,0,0,0)",
            "plot_bgcolor": "rgba(0,0,0,0)",
            "font": {"family": "system-ui, sans-serif", "size": 13},
            "margin": {"l": 8, "r": 12, "t": 12, "b": 8},
            "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom", "traceorder": "normal"},
            "xaxis": {"title": {"text": x_title}, "automargin": True, "zeroline": False},
            "yaxis": {"title": {"text": y_title}, "automargin": True, "zeroline": False},
            "hoverlabel": {"namelength": -1},
        }
    )


def _told(event: Event) -> str:
    size = f", {human(event.n_bytes)}" if event.n_bytes else ""
    return f"{event.kind} {event.index}{size}"
