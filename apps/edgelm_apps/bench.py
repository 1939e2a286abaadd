"""`edgelm bench`: speed in the conventions of llama-bench, over models, budgets, backends and threads."""

from __future__ import annotations

import sys
from collections.abc import Callable
from itertools import product
from typing import TYPE_CHECKING, Any

import click

from edgelm_apps.options import complete_model, offline_option, simulate_option

if TYPE_CHECKING:
    from pathlib import Path

    from tqdm import tqdm

    from edgelm_apps.bench_rows import BenchTest, Row
    from edgelm_apps.bench_run import Combination

PEERS = ("llama.cpp", "llama.cpp-plain")


Read = Callable[[click.Context, click.Parameter, str | None], tuple[Any, ...]]


def _list_of(what: str, read: Callable[[str], Any]) -> Read:
    """Return the callback of an option that takes several values, separated by commas."""

    def convert(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[Any, ...]:
        try:
            return tuple(read(part.strip()) for part in value.split(",")) if value is not None else ()
        except ValueError:
            raise click.BadParameter(f"{value!r} is not a list of {what}, separated by commas") from None

    return convert


def _count(text: str) -> int:
    if (n := int(text)) < 0:
        raise ValueError(text)
    return n


def _threads(text: str) -> int:
    if (n := int(text)) < 1:
        raise ValueError(text)
    return n


def _memory(text: str) -> str:
    from edgelm.sizes import parse_size

    if text != "auto":
        parse_size(text)
    return text


def _peer(text: str) -> str:
    if text not in PEERS:
        raise ValueError(text)
    return text


@click.command()
@click.argument("models", metavar="MODEL...", nargs=-1, required=True, shell_complete=complete_model)
@click.option(
    "-p",
    "--n-prompt",
    callback=_list_of("token counts", _count),
    default="512",
    show_default=True,
    metavar="N,...",
    help="Tokens of the prompts whose reading is measured (tests pp); 0 for none.",
)
@click.option(
    "-n",
    "--n-gen",
    callback=_list_of("token counts", _count),
    default="128",
    show_default=True,
    metavar="N,...",
    help="Tokens whose generation is measured (tests tg); 0 for none.",
)
@click.option(
    "-d",
    "--n-depth",
    callback=_list_of("token counts", _count),
    default="0",
    show_default=True,
    metavar="N,...",
    help="Tokens that are in the cache before a test begins.",
)
@click.option(
    "-r",
    "--repetitions",
    type=click.IntRange(min=1),
    default=5,
    show_default=True,
    help="Times that a test is measured, after a warm-up.",
)
@click.option(
    "--memory",
    callback=_list_of("sizes", _memory),
    default="auto",
    show_default=True,
    metavar="SIZE,...",
    help="Budgets of the whole process; auto is what the device can spare.",
)
@click.option(
    "--backend",
    callback=_list_of("backends", str),
    default="auto",
    show_default=True,
    metavar="NAME,...",
    help="What computes; auto is the fastest healthy one.",
)
@click.option(
    "-t",
    "--threads",
    callback=_list_of("thread counts", _threads),
    metavar="N,...",
    help="Computing threads. [default: free physical cores]",
)
@click.option(
    "--against",
    callback=_list_of(f"peers ({', '.join(PEERS)})", _peer),
    metavar="PEER,...",
    help="Measure llama.cpp in turn with edgelm, under the same memory limit where the system allows: llama.cpp "
    "as it sets itself up, llama.cpp-plain without repacked copies of the weights.",
)
@click.option(
    "--kv",
    callback=_list_of("types", str),
    default="f16",
    show_default=True,
    metavar="TYPE,...",
    help="Types of keys and values in the cache, as in f16,q8_0,q8_0:q4_0; auto is what the budget needs.",
)
@simulate_option
@click.option("-o", "--output", type=click.Choice(["md", "json", "csv"]), default="md", show_default=True)
@click.option("--quiet", "-q", is_flag=True, help="Nothing on stderr but errors.")
@offline_option
def bench(models: tuple[str, ...], output: str, quiet: bool, offline: bool, **given: Any) -> int:
    """Measure speed as llama-bench does: tokens a second of prompts (pp) and of generation (tg), mean ± deviation.

    Every combination of MODEL, budget, backend, threads and type of the cache is measured in a process of its own.
    """
    from edgelm_apps.bench_run import rows_of
    from edgelm_apps.engine import find_model

    if given["simulate"] and given["against"]:
        raise click.UsageError("--simulate slows edgelm's reads only, so --against would not be fair: give one of them")
    tests = _tests(given)
    combinations = _combinations([find_model(model, offline=offline, quiet=quiet) for model in models], given)
    found: list[Row] = []
    code = 0
    try:
        with _progress(combinations, tests, given["repetitions"], quiet) as bar:
            for combination in combinations:
                bar.set_description(f"{combination.path.stem} {combination.memory}")
                found.extend(rows_of(combination, tests, given["repetitions"], bar.update))
    except KeyboardInterrupt:
        code = 130  # what was measured so far is shown
    _print(found, output)
    refused = all(row.failed for row in found)
    return code or (found[0].exit_code if found and refused else 0)


def _tests(given: dict[str, Any]) -> list[BenchTest]:
    from edgelm_apps.bench_rows import BenchTest

    kinds = [("pp", n) for n in given["n_prompt"] if n] + [("tg", n) for n in given["n_gen"] if n]
    if not kinds:
        raise click.UsageError("there is nothing to measure: give --n-prompt or --n-gen a number of tokens")
    return [BenchTest(kind, n, depth) for depth in given["n_depth"] for kind, n in kinds]


def _combinations(paths: list[Path], given: dict[str, Any]) -> list[Combination]:
    from edgelm_apps.bench_run import Combination

    every = product(paths, given["memory"], given["backend"], given["threads"] or (None,), given["kv"])
    return [Combination(*one, given["simulate"], given["against"]) for one in every]


def _progress(combinations: list[Combination], tests: list[BenchTest], repetitions: int, quiet: bool) -> tqdm[Any]:
    from tqdm import tqdm

    turns = sum(1 + len(combination.peers) for combination in combinations) * len(tests) * (repetitions + 1)
    return tqdm(total=turns, leave=False, file=sys.stderr, disable=quiet or not sys.stderr.isatty())


def _print(rows: list[Row], output: str) -> None:
    import edgelm
    from edgelm_apps.bench_rows import as_csv, as_markdown
    from edgelm_apps.output import print_json

    if output == "json":
        print_json({"edgelm": edgelm.__version__, "rows": [row.as_dict() for row in rows]})
    elif rows:
        click.echo(as_markdown(rows) if output == "md" else as_csv(rows))
