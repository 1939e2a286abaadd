"""The few places where the applications call `edgelm`: load a model, ask it, describe it.

`edgelm` is imported inside, so that `edgelm --help` and a mistyped option cost nothing.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from edgelm import Chat, Chunk, Model, Plan, Usage


def find_model(model: str, *, offline: bool, quiet: bool) -> Path:
    """Return the file of a path or a name; a name that is not on this machine is pulled, and that is announced."""
    path = Path(model).expanduser()
    if path.exists():  # what only names need takes 7 ms to import
        return path
    from edgelm_apps.output import note
    from edgelm_models.pull import locate, lookup

    found = lookup(model)
    if found is not None:
        return found
    import subprocess
    import sys

    if not quiet:
        note(f"{model} is not on this machine yet: pulling it once")
    # In a child: what a download imports (20 MB) would stay in this process and count against the budget.
    command = [sys.executable, "-m", "edgelm_apps.cli", "pull", model]
    command += ["--quiet"] * quiet + ["--offline"] * offline
    code = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL).returncode
    if code != 0:
        raise click.exceptions.Exit(code)  # the child has said why
    return locate(model)


def find_draft(engine: dict[str, Any], *, offline: bool, quiet: bool) -> None:
    """Put the path of the draft model, if one is asked for, in the place of its name."""
    if engine.get("draft", "auto") != "auto":
        engine["draft"] = find_model(engine["draft"], offline=offline, quiet=quiet)


def open_model(path: Path, engine: dict[str, Any], *, quiet: bool) -> Model:
    """Load a model; on a terminal the percentage is shown while it loads. Work that is done once is announced."""
    import edgelm
    from edgelm_apps.output import Percentage, note

    with Percentage(f"loading {path.name}", quiet) as shown:
        return edgelm.load(path, progress=shown.show, notice=(lambda _: None) if quiet else note, **engine)


def start_lines(model: Model) -> list[str]:
    """Return what to say at the start: budget and backend, and every decision that the user should know of."""
    from edgelm.sizes import human

    plan = model.plan
    first = f"{model.backend} backend, budget {human(plan.budget_bytes)}, context {plan.context}"
    first += f", simulated {plan.simulated}" if plan.simulated else ""
    return [first, *model.notes]


def budget_lines(model: Model, plan: Plan) -> list[str]:
    """Return what to say after a change of the budget."""
    from edgelm.sizes import human

    return [f"budget {human(plan.budget_bytes)}: predicted {plan.predicted_decode_tps:.1f} tok/s", *model.notes]


def statistics(usage: Usage) -> dict[str, Any]:
    """Return the `stats` object of `run --json`."""
    return {
        "ttft_s": usage.ttft_s,
        "prefill_tps": usage.prefill_tps,
        "decode_tps": usage.decode_tps,
        "peak_bytes": usage.peak_bytes,
        "bytes_streamed": usage.bytes_streamed,
        "kv_bytes_spilled": usage.kv_bytes_spilled,
        "kv_bytes_read": usage.kv_bytes_read,
        "predicted_decode_tps": usage.predicted_decode_tps,
        "elapsed_s": usage.elapsed_s,
        "compute_s": usage.compute_s,
        "wait_s": usage.wait_s,
        "sample_s": usage.sample_s,
        "other_s": usage.other_s,
        "read_s": usage.read_s,
        "passes": usage.passes,
        "drafted_tokens": usage.drafted_tokens,
        "accepted_tokens": usage.accepted_tokens,
        "tokens_per_pass": usage.tokens_per_pass,
        "bytes_per_token": usage.bytes_per_token,
    }


def statistics_text(usage: Usage) -> str:
    """Return the statistics of one answer as three lines."""
    from edgelm.sizes import human

    return (
        f"prompt {usage.prompt_tokens} tokens at {usage.prefill_tps:.1f} tok/s, first token after {usage.ttft_s:.2f} s"
        f"; answer {usage.completion_tokens} tokens at {_speed(usage)}\n"
        f"time: {_split(usage)}{_flash(usage)}\n"
        f"{_guesses(usage)}"
        f"peak {human(usage.peak_bytes)} of {human(usage.budget_bytes)}, {human(usage.bytes_streamed)} streamed, "
        + (f"{human(usage.kv_bytes_read)} of KV read, " if usage.kv_bytes_read else "")
        + f"{usage.backend} backend"
        + (f", simulated {usage.simulated}" if usage.simulated else "")
        + (f"\napproximate: {usage.approximate}" if usage.approximate else "")
    )


def _guesses(usage: Usage) -> str:
    """Return a line on what was guessed, if anything was."""
    if not usage.drafted_tokens:
        return ""
    return (
        f"{usage.tokens_per_pass:.2f} tokens a pass: {usage.accepted_tokens} of {usage.drafted_tokens} guesses right\n"
    )


def status_line(usage: Usage) -> str:
    """Return what `/stats on` shows below each answer."""
    from edgelm.sizes import human

    memory = f"{human(usage.rss_bytes)} of {human(usage.budget_bytes)}"
    return f"{_speed(usage)}; {memory}; {_split(usage)}{_flash(usage)}"


def _speed(usage: Usage) -> str:
    predicted = f" (predicted {usage.predicted_decode_tps:.1f})" if usage.predicted_decode_tps else ""
    return f"{usage.decode_tps:.1f} tok/s{predicted}"


def _split(usage: Usage) -> str:
    whole_s = usage.elapsed_s or 1.0
    parts = {
        "waiting for flash": usage.wait_s,
        "computing": usage.compute_s,
        "sampling": usage.sample_s,
        "other": usage.other_s,
    }
    return ", ".join(f"{part_s / whole_s:.0%} {name}" for name, part_s in parts.items())


def _flash(usage: Usage) -> str:
    from edgelm.sizes import human

    read_bytes = usage.bytes_streamed + usage.kv_bytes_read
    return f"; flash gave {human(read_bytes / usage.read_s)}/s while it was read" if usage.read_s else ""


@contextmanager
def interruptible(model: Model) -> Iterator[None]:
    """While inside, Ctrl-C cancels the answer instead of the program; a second one interrupts as usual."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set signal handlers, and only it is interrupted
        return

    def cancel(signum: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        model.cancel()

    before = signal.signal(signal.SIGINT, cancel)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def ask(chat: Chat, text: str, sampling: dict[str, Any]) -> Generator[Chunk, None, None]:
    """Stream the answer to `text`; closing this closes the stream."""
    yield from chat.stream(text, **sampling)


def complete(model: Model, text: str, sampling: dict[str, Any]) -> Generator[Chunk, None, None]:
    """Stream what follows `text`, without a chat template."""
    yield from model.stream(text, **sampling)
