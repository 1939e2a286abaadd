"""Draws the figures of docs/budgets.md from bench/results: `python bench/figures.py` (pip install matplotlib).

Measures nothing. Every figure says below itself where its numbers come from: script, processor, commit.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import common
import matplotlib

matplotlib.use("svg")

from matplotlib import pyplot as plt

FOLDER = common.ROOT / "docs/figures"
# Okabe and Ito's colours, told apart by nearly everyone
BLUE, ORANGE, GREEN, RED, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#8C8C8C"
NAMES = {"smollm2-135m-instruct": "SmolLM2-135M", "gemma-3-270m": "Gemma-3-270M"}
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "edgelm",  # the same numbers give the same file
    "font.family": "sans-serif",
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#DDDDDD",
    "axes.axisbelow": True,
    "legend.frameon": False,
}


def speed(axes: Any) -> list[dict[str, Any]]:
    """Tokens a second against the budget, and against the memory that was taken."""
    found = _result("memory")
    for colour, (model, name) in zip((BLUE, ORANGE), NAMES.items(), strict=True):
        rows = [row for row in found["rows"]["Budget proofs"] if row["model"] == model]
        axes.plot([row["budget MB"] for row in rows], [row["tok/s"] for row in rows], "o-", color=colour, label=name)
        resident = next(row for row in rows if not row["MB streamed"])
        axes.annotate(
            "all in memory", (resident["budget MB"], resident["tok/s"]), (0, 8), textcoords="offset points",
            ha="center", color=colour,
        )  # fmt: skip
    axes.set(xlabel="budget of the whole process, MB", ylabel="tokens a second", xlim=(0, None), ylim=(0, 185))
    axes.legend(loc="lower right")
    return [found]


def flashes(axes: Any) -> list[dict[str, Any]]:
    """Predicted and measured tokens a second on three kinds of flash, two of them simulated."""
    found = _result("predict")
    named = {
        "this machine's": "this machine's, measured",
        "laptop-sata": "laptop-sata, simulated",
        "phone-emmc": "phone-emmc, simulated",
    }
    for colour, (flash, label) in zip((BLUE, ORANGE, GREEN), named.items(), strict=True):
        rows = [
            row
            for row in found["rows"]["Predicted and measured"]
            if row["flash"] == flash and row["model"] == "gemma-3-270m"
        ]
        at = [row["budget MB"] for row in rows]
        axes.plot(at, [row["tok/s predicted"] for row in rows], "--", color=colour)
        axes.plot(at, [row["tok/s measured"] for row in rows], "o", color=colour, label=label)
    axes.plot([], [], "--", color=GREY, label="predicted before loading")
    axes.set(xlabel="budget of the whole process, MB", ylabel="tokens a second", yscale="log", xlim=(0, None))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.legend(loc="upper left")
    return [found]


def over_time(axes: Any) -> list[dict[str, Any]]:
    """Resident memory from loading to the last token, below its budget."""
    found = _result("over_time")
    for colour, row in zip((BLUE, ORANGE, GREEN), found["rows"]["memory over time"], strict=True):
        at = [at_s for at_s, _ in row["samples"]]
        axes.plot(at, [rss for _, rss in row["samples"]], color=colour, label=f"budget {row['budget MB']:.0f} MB")
        axes.plot([0, at[-1]], [row["budget MB"]] * 2, ":", color=colour)
    axes.set(xlabel="seconds since loading began", ylabel="MB resident", ylim=(0, None), xlim=(0, None))
    axes.legend(loc="lower right")
    return [found]


def live(axes: Any) -> list[dict[str, Any]]:
    """Twenty budgets under one running stream, and the memory of the process after each change."""
    found = _result("live_budget")
    rows = found["rows"]["Changes, smollm2-135m-instruct"]
    numbers = range(1, len(rows) + 1)
    axes.step(numbers, [row["budget MB"] for row in rows], ":", where="mid", color=GREY, label="budget")
    axes.plot(numbers, [row["largest rss MB"] for row in rows], "o", color=BLUE, label="largest resident size in it")
    axes.set(xlabel="change of the budget", ylabel="MB", ylim=(0, None), xticks=[1, 5, 10, 15, 20])
    axes.legend(loc="lower right")
    return [found]


FIGURES: dict[str, Callable[[Any], list[dict[str, Any]]]] = {
    "speed-against-budget": speed,
    "speed-on-other-flash": flashes,
    "memory-over-time": over_time,
    "memory-under-changes": live,
}


def _result(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((common.RESULTS / f"{name}.json").read_text())
    return found


def _source(found: dict[str, Any]) -> str:
    machine, conditions = found["machine"], found["conditions"]
    threads = "one thread" if conditions["threads"] == 1 else f"{conditions['threads']} threads"
    return f"bench/{found['name']}.py, {machine['cpu']}, {threads}, commit {machine['commit']}"


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for name, draw in FIGURES.items():
        with plt.rc_context(STYLE):
            figure, axes = plt.subplots(figsize=(7, 4))
            sources = [_source(found) for found in draw(axes)]
            figure.text(0.01, 0.01, "; ".join(sources), fontsize=7, color="#666666")
            figure.tight_layout(rect=(0, 0.03, 1, 1))
            figure.savefig(FOLDER / f"{name}.svg", metadata={"Date": None, "Description": "; ".join(sources)})
            plt.close(figure)
        print(FOLDER / f"{name}.svg")


if __name__ == "__main__":
    main()
