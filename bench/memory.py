"""Does the budget hold? Fixed memory, and three proofs for every budget.

(a) Without any limit, the largest resident size of the process (the kernel's own count) is within the budget.
(b) In a memory cgroup as large as the budget, libraries in the page cache and the model evicted: no limit hit at all.
(c) The same with nothing cached: no kill, the same text, almost no refaults and major faults after the first token.
(Cold, the readahead of Python's own files charges the group, so (c) cannot ask for no hits.)
The tokens of each run are compared with llama.cpp's. `--random N` takes N random triples of model, context and budget
instead, each with (a) and (b) in one run and every tenth with (c).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import random
import re
import subprocess
from pathlib import Path
from typing import Any

import common

from edgelm_apps import limited

PROMPT = "Once upon a time, in a village by the sea,"
BUDGETS_MB = {"smollm2-135m-instruct": (110, 125, 150, 200, 300), "gemma-3-270m": (150, 180, 220, 300, 400)}


def main() -> None:
    parser = common.arguments(__doc__, rounds=1)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--budgets", nargs="*", type=int, help="MB; default: five for each model")
    parser.add_argument("--context", type=int, help="default: 1024 for SmolLM2, 2048 for Gemma")
    parser.add_argument("--fixed-only", action="store_true")
    parser.add_argument("--random", type=int, metavar="N")
    parser.add_argument("--backend", default="llamacpp", help="ids of others are compared with their own, all resident")
    args = parser.parse_args()
    _SIDE["backend"] = args.backend
    kind = "" if args.backend == "llamacpp" else f"-{args.backend}"
    if args.random:
        random_triples(args)
        return
    report = common.Report(f"memory{kind}", {"threads": args.threads, **_SIDE, "tokens": args.tokens})
    for name in args.models:
        model, context = common.find_model(name), args.context or common.CONTEXTS.get(name, 2048)
        smallest = smallest_budget(model, context, args.threads)
        budgets = [mb * common.MB for mb in args.budgets or BUDGETS_MB.get(name, (smallest // common.MB + 50,))]
        fixed(report, name, model, context, budgets[0], args.threads)
        if not args.fixed_only:
            proofs = Proofs(model, context, args.threads, args.tokens)
            for budget_bytes in (smallest, *budgets):
                report.add("Budget proofs", model=name, context=context, **proofs.of(budget_bytes))
    report.finish()


def random_triples(args: argparse.Namespace) -> None:
    """Prove random plans; write a summary, and every triple that failed."""
    report = common.Report("memory-random", {"threads": args.threads, **_SIDE, "tokens": args.tokens})
    rng, n_cold = random.Random(1), 0
    held: dict[str, int] = {"(a) held": 0, "(b) held": 0, "(c) held": 0}
    for i in range(args.random):
        name, context = rng.choice(args.models), rng.choice((64, 200, 512, 1000, 2048))
        model = common.find_model(name)
        floor = smallest_budget(model, context, args.threads)
        budget_bytes = int(floor + rng.random() ** 2 * 1.1 * model.stat().st_size) // common.MB * common.MB
        proofs = Proofs(model, context, args.threads, args.tokens, compared=False)
        row = {"model": name, "context": context, "budget MB": common.mb(budget_bytes), **proofs.warm(budget_bytes)}
        if i % 10 == 0:
            n_cold += 1
            row |= proofs.cold(budget_bytes)
        for key in held:
            held[key] += bool(row.get(key))
        if not all(row[key] for key in held if key in row):
            report.add("Not held", **row)
    report.add("Random triples", triples=args.random, **held, **{"(c) tried": n_cold})
    report.finish()


def smallest_budget(model: Path, context: int, threads: int) -> int:
    """Return the smallest budget that edgelm names when it refuses one, with 1 % of ease, in whole MB."""
    child = common.run(
        common.edgelm_run(
            model, PROMPT, max_tokens=1, threads=threads, context=context, memory_bytes=common.MB, **_SIDE
        )
    )
    needed = re.search(r"needs ([0-9.]+) MB", child.stderr)
    if needed is None:
        raise RuntimeError(child.stderr)
    return math.ceil(float(needed[1]) * 1.01) * common.MB


def fixed(report: common.Report, name: str, model: Path, context: int, budget_bytes: int, threads: int) -> None:
    """Report all but weights, slots and KV: as planned, and as the peak of a run shows it.

    The run fills the context, because memory that nothing has touched does not count yet.
    """
    prompt = common.text_of(model, context - 32)
    spec = {"model": model, "prompts": [prompt], "max_tokens": 32, "threads": threads, "context": context}
    child = common.run(common.side("ours", **spec, memory=budget_bytes, **_SIDE))
    plan = child.json()["plan"]
    held = plan["pinned_bytes"] + plan["slots_bytes"] + plan["kv_bytes"] + plan["constants_bytes"]
    report.add(
        "Fixed memory, MB",
        model=name,
        context=context,
        budget=common.mb(budget_bytes),
        peak=common.mb(child.peak_bytes),
        **{"peak held": child.peak_bytes <= budget_bytes},
        planned=common.mb(plan["fixed_bytes"]),
        measured=common.mb(child.peak_bytes - held),
        **{key: common.mb(value) for key, value in plan["items"].items()},
    )


_SIDE = {"backend": "llamacpp"}
_ANSWERS: dict[tuple[Path, int], tuple[list[int], str]] = {}


class Proofs:
    """The three proofs of one model; ids are compared with llama.cpp's, or with the backend's own, all resident."""

    def __init__(self, model: Path, context: int, threads: int, n_tokens: int, compared: bool = True) -> None:
        self._model = model
        self._options: dict[str, Any] = {"max_tokens": n_tokens, "threads": threads, "context": context}
        spec = {"model": model, "prompts": [PROMPT], "plain_buffers": True, **self._options}
        key = (model, n_tokens)
        if key not in _ANSWERS:
            if not compared:  # the answer does not depend on the context
                self._options["context"] = spec["context"] = 512
            if _SIDE["backend"] == "llamacpp":
                ids = common.run(common.side("peer", **spec)).json()["runs"][0]["token_ids"]
            else:
                ids = common.run(self._command(None)).json()["token_ids"]
            _ANSWERS[key] = ids, common.run(self._command(None, as_json=False)).stdout
            self._options["context"] = context
        self._ids, self._text = _ANSWERS[key]

    def of(self, budget_bytes: int) -> dict[str, Any]:
        free = common.run(self._command(budget_bytes))
        answer = free.json()
        row: dict[str, Any] = {
            "budget MB": common.mb(budget_bytes),
            "(a) peak MB": common.mb(free.peak_bytes),
            "(a) held": free.peak_bytes <= budget_bytes,
            "same ids": answer["token_ids"] == self._ids,
            "tok/s": answer["stats"]["decode_tps"],
            "MB streamed": common.mb(answer["stats"]["bytes_streamed"]),
        }
        try:
            return row | self.warm(budget_bytes) | self.cold(budget_bytes)
        except limited.NoCgroup as error:
            return row | {"(b)": str(error)}

    def _command(self, budget_bytes: int | None, as_json: bool = True) -> list[str]:
        return common.edgelm_run(
            self._model, PROMPT, memory_bytes=budget_bytes, **_SIDE, as_json=as_json, **self._options
        )

    def warm(self, budget_bytes: int) -> dict[str, Any]:
        limited.evict(self._model)
        inside = limited.run(self._command(budget_bytes), budget_bytes)
        answer = json.loads(inside.stdout) if inside.exit_code == 0 else {"token_ids": [], "stats": {"peak_bytes": 0}}
        same, peak_bytes = answer["token_ids"] == self._ids, answer["stats"]["peak_bytes"]
        return {
            "(a) peak MB": common.mb(peak_bytes),
            "(a) held": 0 < peak_bytes <= budget_bytes,
            "(b) group peak MB": common.mb(inside.peak_bytes),
            "(b) limit hits": inside.limit_hits,
            "(b) held": same and inside.limit_hits == 0 and inside.oom_kills == 0,
        }

    def cold(self, budget_bytes: int) -> dict[str, Any]:
        """Run with nothing cached, and count from the first byte of the answer on."""
        with contextlib.suppress(PermissionError):
            limited.evict_everything()
        with limited.group(budget_bytes) as group:
            child = subprocess.Popen(
                group.command(self._command(budget_bytes, as_json=False)),
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            )  # fmt: skip
            assert child.stdout is not None
            content = os.read(child.stdout.fileno(), 1)
            before = after = group.sample()
            while piece := os.read(child.stdout.fileno(), 4096):
                content, after = content + piece, group.sample()  # until the last token: leaving Python is not decoding
            child.communicate()
            text = content.decode("utf-8", "replace")
            refaults, faults = after.refaults - before.refaults, after.major_faults - before.major_faults
            return {
                "(c) limit hits": group.limit_hits,
                "(c) kills": group.oom_kills,
                "(c) refaults after first token": refaults,
                "(c) major faults after it": faults,
                "(c) held": child.returncode == 0 and group.oom_kills == 0 and text == self._text and refaults < 100,
            }


if __name__ == "__main__":
    main()
