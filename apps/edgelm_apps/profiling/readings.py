"""Says in one sentence what each chart of a profile shows. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from edgelm.sizes import human
from edgelm_apps.profiling.split import Token, mean
from edgelm_apps.profiling.sweep import Profile, Run


def named(run: Run) -> str:
    """Return the name of a run: its budget."""
    return human(run.budget_bytes)


def flash_bound(plans: Sequence[Mapping[str, Any]]) -> list[float | None]:
    """Return the tokens a second that flash alone would allow for each plan; None where it does not matter.

    The rate is what the planner counts with: its prediction times the bytes of a pass, where flash is what binds.
    """
    if not plans or plans[0]["predicted_decode_tps"] >= 0.98 * plans[-1]["predicted_decode_tps"]:
        return [None] * len(plans)
    rate = max(plan["predicted_decode_tps"] * plan["streamed_bytes_per_pass"] for plan in plans)
    return [rate / streamed if (streamed := plan["streamed_bytes_per_pass"]) else None for plan in plans]


def speed(profile: Profile) -> str:
    least, most = profile.runs[0], profile.runs[-1]
    said = f"At {named(least)} the model makes {_tps(least)}"
    if most is not least:
        said += f", at {named(most)} {_tps(most)}"
    errors = [
        abs(run.plan["predicted_decode_tps"] / run.usage["decode_tps"] - 1)
        for run in profile.runs
        if run.usage["decode_tps"] and run.plan["predicted_decode_tps"]
    ]
    return f"{said}; the prediction is off by {sum(errors) / len(errors):.0%} on average." if errors else f"{said}."


def memory(profile: Profile) -> str:
    tightest = max(profile.runs, key=lambda run: run.usage["peak_bytes"] / run.budget_bytes)
    over = [run for run in profile.runs if run.usage["peak_bytes"] > run.budget_bytes]
    share = tightest.usage["peak_bytes"] / tightest.budget_bytes
    said = (
        f"At {named(tightest)} the process peaked at {human(tightest.usage['peak_bytes'])}, {share:.0%} of its budget"
    )
    return (
        f"{said}; {len(over)} of {len(profile.runs)} runs went over theirs." if over else f"{said}; no run went over."
    )


def split(profile: Profile) -> str:
    least, most = profile.runs[0], profile.runs[-1]
    said = f"At {named(least)} a token takes {_spent(mean(least.tokens))}"
    return f"{said}; at {named(most)}, {_spent(mean(most.tokens))}." if most is not least else f"{said}."


def token_by_token(run: Run) -> str:
    if not run.tokens:
        return f"At {named(run)} the answer was too short to compare tokens."
    slowest = max(run.tokens, key=lambda token: token.total_s)
    middle = sorted(token.total_s for token in run.tokens)[len(run.tokens) // 2]
    return f"At {named(run)} the middle token took {_ms(middle)}, the slowest {_ms(slowest.total_s)}."


def units(run: Run) -> str:
    reads = [event for event in run.events if event.kind == "read"]
    if not reads:
        return f"At {named(run)} nothing is read from flash: all weights are resident."
    average = mean(run.tokens)
    rate = f"{human(run.usage['bytes_streamed'] / run.usage['read_s'])}/s" if run.usage["read_s"] else "nothing"
    busy = average.read_s / average.total_s if average.total_s else 0.0
    return f"At {named(run)} flash was busy {busy:.0%} of the time and gave {rate}; dotted lines end a token."


def where(profile: Profile) -> str:
    least = profile.runs[0]
    items = least.plan["items"]
    largest = max((name for name in items if name != "unused"), key=lambda name: items[name])
    streamed = least.plan["streamed_bytes_per_pass"]
    said = f"At {named(least)} the largest part is {largest} with {human(items[largest])}"
    return f"{said}; {human(streamed)} of the {human(least.plan['pass_bytes'])} weights are read for each token."


def _tps(run: Run) -> str:
    return f"{run.usage['decode_tps']:.3g} tok/s"


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.3g} ms"


def _spent(token: Token) -> str:
    whole = token.total_s or 1.0
    return (
        f"{_ms(token.total_s)}, {token.wait_s / whole:.0%} of it waiting for flash "
        f"and {token.compute_s / whole:.0%} computing"
    )
