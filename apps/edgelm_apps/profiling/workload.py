"""What a child process of the profiler does: survey the budgets of a model, or run one workload at one budget.

`python -m edgelm_apps.profiling.workload` takes a request as JSON on stdin and prints the answer as JSON. A process of
its own, with nothing but `edgelm` in it, so that its peak is that of the model alone.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from typing import Any

import edgelm
from edgelm.errors import BudgetTooSmall, EdgeLMError

EVERYTHING = 1 << 50
"""A budget that holds any model."""


def survey(path: str, engine: dict[str, Any], n_points: int) -> dict[str, Any]:
    """Return the smallest budget that works, the one with which everything stays, and plans in between."""
    largest = edgelm.plan(path, memory=EVERYTHING, **engine).planned_bytes  # first: what is measured for it is kept
    smallest = largest
    try:
        edgelm.plan(path, memory=1, **engine)
    except BudgetTooSmall as error:
        smallest = error.needed_bytes
    plans = []
    for i in range(n_points):
        budget = smallest + (largest - smallest) * i // max(n_points - 1, 1)
        try:
            plans.append(edgelm.plan(path, memory=budget, **engine).as_dict())
        except BudgetTooSmall:  # this process has grown since the smallest was found
            continue
    return {"smallest_bytes": smallest, "largest_bytes": largest, "plans": plans}


def run(path: str, engine: dict[str, Any], memory: int, prompt: str, n_tokens: int) -> dict[str, Any]:
    """Load the model, warm up, run the workload while it is recorded. `marks_s` are times of `time.monotonic`."""
    marks_s = {"began": time.monotonic()}
    with edgelm.load(path, memory=memory, **engine) as model:
        marks_s["loaded"] = time.monotonic()
        # compiles the programs; the line feed makes the cache useless for the prompt itself
        model.generate("\n" + prompt, max_tokens=2, ignore_eos=True)
        with model.record() as timeline:
            marks_s["warm"] = time.monotonic()
            *_, last = model.stream(prompt, max_tokens=n_tokens, ignore_eos=True)
        marks_s["ended"] = time.monotonic()
        usage = dataclasses.asdict(last.usage) | {"other_s": last.usage.other_s}
        found = {"plan": model.plan.as_dict(), "backend": model.backend, "notes": model.notes, "usage": usage}
    events = [(event.kind, event.index, event.begin_s, event.end_s, event.n_bytes) for event in timeline.events()]
    return found | {"marks_s": marks_s, "events": events, "events_dropped": timeline.dropped}


def main() -> int:
    """Answer the request on stdin; an error that edgelm raises on purpose is an answer, too."""
    request = json.load(sys.stdin)
    try:
        answer = survey(**request) if request.pop("do") == "survey" else run(**request)
    except EdgeLMError as error:
        answer = {"error": str(error), "exit_code": error.exit_code}
    json.dump(answer, sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main())
