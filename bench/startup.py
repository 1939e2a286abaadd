"""Whole processes, from start to the first token on stdout, files in the page cache: edgelm against llama-cpp-python.

edgelm twice: its command line, and three lines of Python; llama-cpp-python: three lines of Python. In turn, so that
whatever else the machine does meets all of them.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import common

PROMPT = "The quick brown fox jumps over the lazy"
OURS = """
import edgelm
with edgelm.load({model!r}, threads={threads}, context=1024, backend="llamacpp") as model:
    print(next(model.stream({prompt!r}, max_tokens=1)).text, flush=True)
"""
THEIRS = """
from llama_cpp import Llama
llm = Llama({model!r}, n_threads={threads}, n_threads_batch={threads}, n_ctx=1024, verbose=False)
print(next(llm({prompt!r}, max_tokens=1, temperature=0, stream=True))["choices"][0]["text"], flush=True)
"""


ENV = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
"""Installed packages have their bytecode beside them; a source tree that may not keep it compiles at each start."""


def first_byte_s(argv: list[str]) -> tuple[float, float]:
    """Return the seconds until the first byte on stdout and until the end of the process."""
    began = time.perf_counter()
    with subprocess.Popen(
        argv, env=ENV, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as child:
        assert child.stdout is not None
        found = child.stdout.read(1)
        first_s = time.perf_counter() - began
        child.stdout.read()
    if child.returncode != 0 or not found:
        raise RuntimeError(f"exit code {child.returncode}, no first token: {argv}")
    return first_s, time.perf_counter() - began


def main() -> None:
    args = common.arguments(__doc__, rounds=9).parse_args()
    report = common.Report(
        "startup",
        {"threads": args.threads, "backend": "llamacpp", "budget": "default", "context": 1024, "rounds": args.rounds},
    )
    for name in args.models:
        model = common.find_model(name)
        model.read_bytes()  # into the page cache
        sides = commands(model, args.threads)
        for argv in sides.values():
            first_byte_s(argv)  # compiled modules, libraries, tokenizer tables, verdict on the backend
        times: dict[str, list[tuple[float, float]]] = {who: [] for who in sides}
        for _ in range(args.rounds):
            for who, argv in sides.items():
                times[who].append(first_byte_s(argv))
        theirs = common.middle(first for first, _ in times["llama-cpp-python"])
        for who, values in times.items():
            first_s = common.middle(first for first, _ in values)
            report.add(
                "Process start to first token, seconds",
                model=name,
                engine=who,
                median=first_s,
                lowest=min(first for first, _ in values),
                highest=max(first for first, _ in values),
                **{
                    "whole process": common.middle(whole for _, whole in values),
                    "of llama-cpp-python's": first_s / theirs,
                },
                every=[first for first, _ in values],
            )
    report.finish()


def commands(model: Path, threads: int) -> dict[str, list[str]]:
    places = {"model": str(model), "threads": threads, "prompt": PROMPT}
    return {
        "edgelm run": common.edgelm_run(
            model, PROMPT, max_tokens=1, threads=threads, context=1024, backend="llamacpp", as_json=False
        ),
        "edgelm, Python": [sys.executable, "-c", OURS.format(**places)],
        "llama-cpp-python": [sys.executable, "-c", THEIRS.format(**places)],
    }


if __name__ == "__main__":
    main()
