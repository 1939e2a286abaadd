"""Runs a workload at one budget after another, each in a child process, and watches the child's memory.

Knows processes and figures; nothing of how they are shown.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edgelm.errors import EdgeLMError
from edgelm.sizes import MB, human
from edgelm_apps.profiling.split import Event, Token, excerpt, tokens

SAMPLE_S = 0.02
MAX_SAMPLES = 400
"""Samples kept of a run; of more, the highest of each stretch."""
N_PLANS = 33
EXCERPT_TOKENS = 3
MARGIN_BYTES = 2 * MB
"""Added to the smallest budget: interpreters are not equally large from run to run."""


class WorkloadFailed(EdgeLMError):
    """A child process of the profiler could not do its part."""

    def __init__(self, message: str, exit_code: int = 1) -> None:
        self.exit_code = exit_code
        super().__init__(message)


@dataclass(frozen=True, slots=True)
class Workload:
    """What is run at every budget. `engine` are the options of `edgelm.load` other than the budget."""

    path: Path
    engine: dict[str, Any]
    prompt: str
    n_tokens: int


@dataclass(frozen=True, slots=True)
class Run:
    """One budget, measured. `memory` are (seconds since the load began, resident bytes); `events` a few tokens' worth.

    `warm_s` is when the workload began, on the clock of `memory`.
    """

    budget_bytes: int
    plan: dict[str, Any]
    backend: str
    notes: tuple[str, ...]
    usage: dict[str, Any]
    load_s: float
    warm_s: float
    memory: tuple[tuple[float, int], ...]
    tokens: tuple[Token, ...]
    events: tuple[Event, ...]
    events_dropped: int


@dataclass(frozen=True, slots=True)
class Profile:
    """All that was measured. `plans` is what the planner predicts between the smallest and the largest budget."""

    model: str
    device: dict[str, Any]
    engine: dict[str, Any]
    n_tokens: int
    prompt_tokens: int
    smallest_bytes: int
    largest_bytes: int
    plans: tuple[dict[str, Any], ...]
    runs: tuple[Run, ...]
    failed: tuple[tuple[int, str], ...]

    def as_dict(self) -> dict[str, Any]:
        """Return the profile as plain values, for JSON."""
        return asdict(self)


def profile(
    workload: Workload, budgets: Sequence[int] | int, device: dict[str, Any], say: Callable[[str], None]
) -> Profile:
    """Run `workload` at every budget (a number: that many, evenly from the smallest to all resident).

    A budget that fails is reported among the others. Raises `WorkloadFailed` if all do.
    """
    say("looking for the smallest budget and the one that holds everything")
    request = {"do": "survey", "path": str(workload.path), "engine": workload.engine, "n_points": N_PLANS}
    found, _ = _child(request)
    chosen = _spaced(found["smallest_bytes"], found["largest_bytes"], budgets) if isinstance(budgets, int) else budgets
    runs, failed = [], []
    for number, budget in enumerate(chosen, 1):
        say(f"{number} of {len(chosen)}: {human(budget)}")
        try:
            runs.append(measure(workload, budget))
        except WorkloadFailed as error:
            say(str(error))
            failed.append((budget, str(error)))
            code = error.exit_code
    if not runs:
        raise WorkloadFailed(f"no budget worked; the last one said: {failed[-1][1]}", code)
    return Profile(
        model=workload.path.name,
        device=device,
        engine=workload.engine,
        n_tokens=workload.n_tokens,
        prompt_tokens=runs[0].usage["prompt_tokens"],
        smallest_bytes=found["smallest_bytes"],
        largest_bytes=found["largest_bytes"],
        plans=tuple(found["plans"]),
        runs=tuple(runs),
        failed=tuple(failed),
    )


def measure(workload: Workload, budget_bytes: int) -> Run:
    """Run the workload at one budget in a process of its own."""
    found, samples = _child(
        {
            "do": "run",
            "path": str(workload.path),
            "engine": workload.engine,
            "memory": budget_bytes,
            "prompt": workload.prompt,
            "n_tokens": workload.n_tokens,
        }
    )
    marks = found["marks_s"]
    events = [Event(*event) for event in found["events"]]
    inside = [(at_s - marks["began"], rss) for at_s, rss in samples if marks["began"] <= at_s <= marks["ended"]]
    return Run(
        budget_bytes=budget_bytes,
        plan=found["plan"],
        backend=found["backend"],
        notes=tuple(found["notes"]),
        usage=found["usage"],
        load_s=marks["loaded"] - marks["began"],
        warm_s=marks["warm"] - marks["began"],
        memory=thinned(inside, MAX_SAMPLES),
        tokens=tokens(events),
        events=excerpt(events, EXCERPT_TOKENS),
        events_dropped=found["events_dropped"],
    )


def thinned(samples: Sequence[tuple[float, int]], n: int) -> tuple[tuple[float, int], ...]:
    """Return at most `n` samples, the highest of each stretch: a peak is never lost."""
    step = -(-len(samples) // n) or 1
    return tuple(max(samples[i : i + step], key=lambda sample: sample[1]) for i in range(0, len(samples), step))


def _spaced(smallest: int, largest: int, n: int) -> list[int]:
    least = smallest + MARGIN_BYTES
    most = max(largest + MARGIN_BYTES, least)
    steps = [least + (most - least) * i // max(n - 1, 1) for i in range(n)]
    return sorted({-(-step // MB) * MB for step in steps})


def _child(request: dict[str, Any]) -> tuple[dict[str, Any], list[tuple[float, int]]]:
    """Return a child's answer, and samples of its memory; this process takes them, so that the child stays itself."""
    command = [sys.executable, "-m", "edgelm_apps.profiling.workload"]
    child = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding="utf-8"
    )
    samples: list[tuple[float, int]] = []
    watcher = threading.Thread(target=_watch, args=(child, samples), daemon=True)
    watcher.start()
    try:
        out, err = child.communicate(json.dumps(request))
    except BaseException:
        child.kill()
        child.wait()
        raise
    finally:
        watcher.join()
    if child.returncode != 0:
        said = err.strip().splitlines()[-1:] or ["nothing"]
        raise WorkloadFailed(f"the child process ended with code {child.returncode} and said: {said[0]}")
    answer: dict[str, Any] = json.loads(out)
    if "error" in answer:
        raise WorkloadFailed(answer["error"], answer["exit_code"])
    return answer, samples


def _watch(child: subprocess.Popen[str], samples: list[tuple[float, int]]) -> None:
    import psutil

    try:
        process = psutil.Process(child.pid)
        while child.returncode is None:
            samples.append((time.monotonic(), process.memory_info().rss))
            time.sleep(SAMPLE_S)
    except psutil.Error:
        return  # it has ended
