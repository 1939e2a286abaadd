"""`edgelm profile`: a workload at one budget after another, and a page that shows what came of it."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgelm_apps.options import engine_options, engine_values, model_argument, offline_option, quiet_option
from edgelm_apps.run import decoded

if TYPE_CHECKING:
    from edgelm_apps.profiling.sweep import Profile

PROMPT = "Explain in a few sentences how a computer reads a file from a disk into memory, and why that takes time."
CONTEXT = 1024
PAGE = "profile.html"


@click.command()
@model_argument()
@click.option("--budgets", type=click.IntRange(min=1), help="Without --memory: how many budgets. [default: 6]")
@click.option("--tokens", type=click.IntRange(min=2), default=32, show_default=True, help="Tokens of each answer.")
@click.option("--prompt", metavar="TEXT", help="What is asked, without a chat template. [default: a short question]")
@click.option("--prompt-file", type=click.File("rb"), metavar="FILE", help="Take the prompt from FILE.")
@click.option(
    "-o", "--output", type=click.Path(dir_okay=False, writable=True, path_type=Path), metavar="FILE",
    help=f"The page. [default: {PAGE}, or none with --json alone]",
)  # fmt: skip
@click.option(
    "--json", "json_file", type=click.Path(dir_okay=False, writable=True, allow_dash=True, path_type=Path),
    metavar="FILE", help="Write the figures as JSON, too; - is stdout.",
)  # fmt: skip
@quiet_option
@offline_option
@engine_options
def profile(model: str, quiet: bool, offline: bool, **given: Any) -> None:
    """Measure MODEL at several memory budgets and draw it.

    Each budget runs in a process of its own. --memory takes several sizes here, as in 100MB,200MB; without it the
    budgets go from the smallest that works to the one that holds everything.
    """
    from edgelm_apps.engine import find_model
    from edgelm_apps.output import note
    from edgelm_apps.profiling.page import need_plotly
    from edgelm_apps.profiling.sweep import Workload
    from edgelm_apps.profiling.sweep import profile as measure

    output, json_file, n_tokens = given.pop("output"), given.pop("json_file"), given.pop("tokens")
    if output is None and json_file is None:
        output = Path(PAGE)
    _check_folders(output, json_file)
    if output is not None:
        need_plotly()
    prompt = _prompt(given.pop("prompt"), given.pop("prompt_file"))
    budgets = _budgets(given.pop("memory"), given.pop("budgets"))
    engine = engine_values(given | {"memory": None})
    path = find_model(model, offline=offline, quiet=quiet)
    engine.setdefault("context", _context(path))
    device = _device(path, engine)
    done = measure(Workload(path, engine, prompt, n_tokens), budgets, device, _say_nothing if quiet else note)
    _write(done, output, json_file)
    if output is not None and not quiet:
        note(f"{output} shows it; open it in a browser")


def _check_folders(*paths: Path | None) -> None:
    for path in paths:
        if path is not None and not path.parent.is_dir():
            raise click.UsageError(f"there is no folder {path.parent} for {path.name}; make it first")


def _prompt(prompt: str | None, file: Any) -> str:
    if prompt is not None and file is not None:
        raise click.UsageError("give --prompt or --prompt-file, not both")
    default = PROMPT if prompt is None else prompt
    text = decoded(file.read(), file.name) if file is not None else default
    if not text:
        raise click.UsageError("the prompt is empty; give it at least one word")
    return text


def _budgets(memory: str | None, budgets: int | None) -> list[int] | int:
    from edgelm.sizes import parse_size

    if memory is None:
        return budgets or 6
    if budgets is not None:
        raise click.UsageError("--memory names the budgets and --budgets counts them: give one of them")
    return sorted({parse_size(size) for size in memory.split(",")})


def _context(path: Path) -> int:
    """Return the context of a profile that asks for none: the same at every budget, so that only weights differ."""
    import edgelm

    found = edgelm.inspect(path)
    return min(int(found.metadata.get(f"{found.architecture}.context_length", CONTEXT)), CONTEXT)


def _device(path: Path, engine: dict[str, Any]) -> dict[str, Any]:
    import edgelm
    from edgelm_apps.output import plain

    facts: dict[str, Any] = plain(edgelm.doctor(path))
    facts["backend_versions"] = {report.name: report.version for report in edgelm.backends()}
    facts["threads"] = engine.get("threads", facts["cores"]["usable"])
    facts["date"] = datetime.now().astimezone().isoformat(sep=" ", timespec="minutes")
    return facts


def _write(done: Profile, output: Path | None, json_file: Path | None) -> None:
    if json_file is not None:
        import json

        text = json.dumps(done.as_dict(), ensure_ascii=False, indent=1)
        if str(json_file) == "-":
            click.echo(text)
        else:
            json_file.write_text(text + "\n", encoding="utf-8")
    if output is not None:
        from edgelm_apps.profiling.page import render

        output.write_text(render(done), encoding="utf-8")


def _say_nothing(text: str) -> None:
    """With --quiet there is no progress to tell of."""
