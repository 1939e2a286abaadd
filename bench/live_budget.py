"""Does the budget hold while it changes? Twenty changes of it under a running stream, on each model.

A child decodes `--tokens` tokens twice, the prompt included: once with the largest budget, once with random budgets
between the smallest that works and the largest, one change every few tokens. For each change: the time it takes, the
resident size when it has returned and after each token until the next change, and what the cgroup holds by then.
The tokens must be the same, every size within the budget of its moment, the peak within the largest budget.
"""

from __future__ import annotations

import json
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import common

import edgelm
from edgelm.memory.platform import current_platform
from edgelm_apps import limited

PROMPT = "Once upon a time, in a village by the sea,"
EVERY = 3
"""Tokens from one change to the next."""
SPARE_BYTES = 400 * common.MB
"""Room of the group beside the largest budget: nothing may be reclaimed there but what edgelm gives back."""


def main() -> None:
    parser = common.arguments(__doc__, rounds=1)
    parser.add_argument("--changes", type=int, default=20)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--largest", type=int, help="MB; default: everything resident and 40 MB more")
    parser.add_argument("--seed", type=int, default=3)
    args = parser.parse_args()
    conditions = {"threads": args.threads, "context": args.context, "changes": args.changes, "seed": args.seed}
    report = common.Report("live_budget", conditions)
    for name in args.models:
        model = common.find_model(name)
        largest = (args.largest or model.stat().st_size // common.MB + 120) * common.MB
        spec = {**conditions, "model": str(model), "largest": largest}
        limited.evict(model)
        with limited.group(largest + SPARE_BYTES) as group:
            argv = [sys.executable, __file__, json.dumps({**spec, "group": str(group.folder)})]
            found = common.run(group.command(argv)).json()
            found["kills"] = group.oom_kills
        add(report, name, largest, found)
    report.finish()


def add(report: common.Report, name: str, largest: int, found: dict[str, Any]) -> None:
    changes = found["changes"]
    took_ms = sorted(change["s"] * 1000 for change in changes)
    for i, change in enumerate(changes):
        report.add(
            f"Changes, {name}",
            change=i + 1,
            **{"budget MB": common.mb(change["budget"]), "planned MB": common.mb(change["planned"])},
            **{"streamed MB per token": common.mb(change["streamed"]), "ms": change["s"] * 1000},
            **{f"{key} MB": common.mb(change[key]) for key in ("rss at once", "rss after a token", "largest rss")},
            **{"group MB": common.mb(change["group"])},
            held=max(change["rss after a token"], change["largest rss"]) <= change["budget"],
        )
    report.add(
        "Summary",
        model=name,
        **{"smallest MB": common.mb(found["floor"]), "largest MB": common.mb(largest)},
        tokens=found["tokens"],
        **{"same tokens": found["same"], "peak MB": common.mb(found["peak"]), "peak held": found["peak"] <= largest},
        **{"rss held": sum(change["largest rss"] <= change["budget"] for change in changes), "of": len(changes)},
        **{"group held": sum(change["group"] <= change["budget"] for change in changes)},
        **{"ms median": common.middle(took_ms), "ms most": took_ms[-1], "kills": found["kills"]},
    )


# -- the child -----------------------------------------------------------------------------------------


def child(spec: dict[str, Any]) -> dict[str, Any]:
    options = {"memory": spec["largest"], "context": spec["context"], "threads": spec["threads"]}
    n_tokens = (spec["changes"] + 1) * EVERY
    with edgelm.load(spec["model"], **options) as model:
        expected = [chunk.token_id for chunk in stream(model, n_tokens)]
        model.generate("Another text, so that nothing of the first is in the cache.", max_tokens=1)
        floor = smallest(model)
        budgets = Budgets(floor, spec["largest"], spec["seed"])
        changes: list[dict[str, Any]] = []
        ids = []
        for i, chunk in enumerate(stream(model, n_tokens)):
            ids.append(chunk.token_id)
            if changes:
                measure(changes[-1], Path(spec["group"]))
            if i % EVERY == EVERY - 1 and len(changes) < spec["changes"]:
                changes.append(change(model, next(budgets)))
        peak = current_platform().peak_rss_bytes()
    return {"changes": changes, "floor": floor, "tokens": len(ids), "same": ids == expected, "peak": peak}


def stream(model: edgelm.Model, n_tokens: int) -> Iterator[edgelm.Chunk]:
    chunks = model.stream(PROMPT, max_tokens=n_tokens, ignore_eos=True)
    return (chunk for chunk in chunks if chunk.token_id is not None)


def smallest(model: edgelm.Model) -> int:
    try:
        model.set_budget(1)
    except edgelm.BudgetTooSmall as error:
        return error.needed_bytes
    raise AssertionError("no model fits into one byte")


class Budgets:
    """Random budgets, the two ends of the range among them."""

    def __init__(self, floor: int, largest: int, seed: int) -> None:
        self._random, self._floor, self._largest = random.Random(seed), floor, largest
        self._first = [floor, largest, floor]

    def __next__(self) -> int:
        return self._first.pop() if self._first else self._random.randint(self._floor, self._largest)


def change(model: edgelm.Model, budget: int) -> dict[str, Any]:
    began = time.perf_counter()
    plan = model.set_budget(budget)
    took_s = time.perf_counter() - began
    rss = current_platform().rss_bytes()
    facts = {"budget": budget, "planned": plan.planned_bytes, "streamed": plan.streamed_bytes, "s": took_s}
    return facts | {"rss at once": rss, "largest rss": rss}


def measure(change: dict[str, Any], group: Path) -> None:
    rss = current_platform().rss_bytes()
    change.setdefault("rss after a token", rss)
    change["largest rss"] = max(change["largest rss"], rss)
    usage = next(file for name in ("memory.current", "memory.usage_in_bytes") if (file := group / name).exists())
    change["group"] = int(usage.read_text())


if __name__ == "__main__":
    if sys.argv[1:] and sys.argv[1].startswith("{"):
        print(json.dumps(child(json.loads(sys.argv[1]))))
    else:
        main()
