"""What a model would do on boards that are not here, by the planner: budgets x boards.

Predictions from published figures. Nothing is measured but what Python and its libraries take on this machine.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from edgelm_apps.pi.asking import AMPLE, edgelm_json, options

CONTEXT = 1024
N_BUDGETS = 4
STEP_BYTES = 5_000_000
HIDDEN = 0.95
"""Share of the speed with everything in memory from which reads count as hidden."""
SPARE = 1.05
"""Times what is needed that the smallest budget is: processes differ a little."""
LABEL = "predictions by the planner from published figures; nothing was measured on a board"
COLUMNS = ("board", "budget", "in memory", "read a token", "tok/s", "first token", "bound by")


class Expected(NamedTuple):
    """One board at one budget. `resident_bytes` and `streamed_bytes` are of weights, the latter of each token."""

    device: str
    budget_bytes: int
    resident_bytes: int
    streamed_bytes: int
    decode_tps: float
    prompt_tokens: int
    ttft_s: float
    planned_bytes: int
    backend: str

    def cells(self) -> tuple[str, ...]:
        """Return the row of a table."""
        from edgelm.sizes import human

        streamed = human(self.streamed_bytes) if self.streamed_bytes else "-"
        speed, first = f"{self.decode_tps:.3g}", f"{self.ttft_s:.2g} s"
        return self.device, human(self.budget_bytes), human(self.resident_bytes), streamed, speed, first, self.bound

    @property
    def bound(self) -> str:
        """What keeps it from being faster; reads may be hidden behind computing."""
        import edgelm

        processor = edgelm.devices()[self.device].processor
        assert processor is not None
        resident_tps = processor.compute_bytes_per_s / (self.resident_bytes + self.streamed_bytes)
        return "processor" if self.decode_tps > HIDDEN * resident_tps else "flash"


def usable_backend() -> str:
    """Return whose memory plans count with: ggml's kernels, of which the published figures are, if they work here."""
    import edgelm

    works = {report.name for report in edgelm.backends() if report.available}
    return "llamacpp" if "llamacpp" in works else "numpy"


def expected(
    path: Path, names: Sequence[str], budgets: Sequence[int], backend: str, context: int = CONTEXT
) -> list[Expected]:
    """Return what is to be expected at each budget of each board; without `budgets` at some that differ.

    A budget that is chosen here and that a board cannot spare is left out.
    """
    import edgelm

    chosen = budgets or _budgets(path, names[0], backend, context)
    jobs = [(name, size) for name in names for size in chosen if budgets or size <= edgelm.devices()[name].memory_bytes]

    def planned(job: tuple[str, int]) -> Expected:
        return _expected(path, *job, backend, context)

    with ThreadPoolExecutor(min(os.cpu_count() or 1, 4)) as workers:
        return list(workers.map(planned, jobs))


def _expected(path: Path, name: str, budget: int, backend: str, context: int) -> Expected:
    """Plan in a process of its own, which is as large as one that only loads the model."""
    asked = {"memory": budget, "backend": backend, "context": context, "simulate": name}
    plan = edgelm_json("plan", path, "--published", "--no-speculate", *options(asked))
    streamed = plan["streamed_bytes_per_pass"]
    return Expected(
        device=name,
        budget_bytes=budget,
        resident_bytes=max(plan["pass_bytes"] - streamed, 0),
        streamed_bytes=streamed,
        decode_tps=plan["predicted_decode_tps"],
        prompt_tokens=plan["predicted_ttft_prompt_tokens"],
        ttft_s=plan["predicted_ttft_s"],
        planned_bytes=plan["predicted_peak_bytes"],
        backend=backend,
    )


def as_dict(path: Path, rows: Sequence[Expected], context: int) -> dict[str, Any]:
    """Return everything as plain values, constants and their sources too."""
    import edgelm

    names = dict.fromkeys(row.device for row in rows)
    return {
        "model": path.name,
        "context": context,
        "measured": False,
        "label": LABEL,
        "devices": {name: edgelm.devices()[name]._asdict() for name in names},
        "expected": [row._asdict() for row in rows],
    }


def notes(rows: Sequence[Expected]) -> Iterator[str]:
    """Yield what the table needs to be understood."""
    import edgelm
    from edgelm.sizes import human

    devices = [edgelm.devices()[name] for name in dict.fromkeys(row.device for row in rows)]
    for device in devices:
        yield f"{device}: {device.about}"
    for processor in dict.fromkeys(device.processor for device in devices if device.processor):
        boards = ", ".join(device.name for device in devices if device.processor == processor)
        yield (
            f"processor of {boards}: {human(processor.compute_bytes_per_s)}/s of weights for a token, "
            f"{human(processor.wide_bytes_per_s)}/s times tokens of a prompt: {processor.source}"
        )
    yield "small models lose more beside their weights than the large ones that were measured: figures are upper bounds"
    yield f"memory is that of the {rows[0].backend} backend and of Python on this machine"


def _budgets(path: Path, name: str, backend: str, context: int) -> list[int]:
    """Return budgets from the smallest that works to the one that holds everything."""
    import edgelm
    from edgelm.errors import BudgetTooSmall

    asked = {"backend": backend, "context": context, "simulate": name}
    whole = edgelm_json("plan", path, "--published", "--no-speculate", "--memory", AMPLE, *options(asked))
    most = least = whole["predicted_peak_bytes"]
    try:
        edgelm.plan(path, memory=1, backend=backend, context=context, simulate=name, published=True, speculate=False)
    except BudgetTooSmall as error:
        least = int(error.needed_bytes * SPARE)
    steps = [least + (most - least) * i // (N_BUDGETS - 1) for i in range(N_BUDGETS)]
    return sorted({-(-size // STEP_BYTES) * STEP_BYTES for size in steps})
