"""How much is read for each token, and how fast, against the same reads without a model, in turn within one process.

Three turns follow each other. One decodes some tokens. One reads the same offsets without a model, in the same order
and in the same blocks, with O_DIRECT into huge pages: the better of two and four threads. One decodes as many tokens
after the budget was raised until nothing streams. Bound on the bytes: 1.03 x max(0, pass bytes - (budget - fixed - KV -
slots)), where fixed is all but weights, KV and slots. Bounds on the time: where flash is the slower, 92 % of the raw
bandwidth; else 1.10 times the slower of computing alone and reading alone.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import common

import edgelm
from edgelm.memory.buffer import Buffer

PROMPT = "Once upon a time, in a village by the sea,"
BUDGETS_MB = {"smollm2-135m-instruct": (90, 100, 110, 125), "gemma-3-270m": (125, 150, 180, 220)}
PAGE, ENOUGH_BYTES = 4096, 2_000_000_000
N_READERS = (2, 4)


class Raw:
    """Reads the given ranges again and again, past the page cache, with `n_threads` threads."""

    def __init__(self, paths: Sequence[Path], ranges: Sequence[tuple[int, int, int]], n_threads: int) -> None:
        self._handles = [os.open(path, os.O_RDONLY | os.O_DIRECT) for path in paths]
        self._ranges = [(file, start, stop - start) for file, start, stop in map(_aligned, ranges)]
        largest = max(n_bytes for _, _, n_bytes in self._ranges)
        self._buffers = [Buffer(largest, huge=True) for _ in range(n_threads)]

    @property
    def n_bytes(self) -> int:
        return sum(n_bytes for _, _, n_bytes in self._ranges)

    def bytes_per_s(self, rounds: int) -> float:
        waiting = list(reversed(self._ranges * rounds))
        began = time.perf_counter()
        threads = [threading.Thread(target=self._work, args=(waiting, buffer)) for buffer in self._buffers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return self.n_bytes * rounds / (time.perf_counter() - began)

    def _work(self, waiting: list[tuple[int, int, int]], buffer: Buffer) -> None:
        view = buffer.view
        while True:
            try:
                file, start, n_bytes = waiting.pop()
            except IndexError:
                return
            os.preadv(self._handles[file], [view[:n_bytes]], start)


def _aligned(part: tuple[int, int, int]) -> tuple[int, int, int]:
    file, offset, n_bytes = part
    return file, offset // PAGE * PAGE, -(-(offset + n_bytes) // PAGE) * PAGE


def child(spec: dict[str, Any]) -> dict[str, Any]:
    """Measure one budget in this process."""
    options = {key: spec[key] for key in ("memory", "threads", "context")}
    with edgelm.load(spec["model"], backend="llamacpp", **options) as model:
        plan = model.plan
        if not plan.streamed:
            return {"streams": False}
        window = model._engine.window
        ranges = [(block.file, block.offset, block.n_bytes) for run in window.cycle for block in window._requests[run]]
        raws = [Raw(model.file.paths, ranges, n) for n in N_READERS]
        rounds = max(1, int(spec["tokens"] // 2))
        turns, raw_speeds = [], []
        for turn in range(spec["rounds"] + 1):
            measured = _turn(model, f"{turn}. {PROMPT}", spec["tokens"])
            speeds = [raw.bytes_per_s(rounds) for raw in raws]
            if spec["memory"] < ENOUGH_BYTES:
                model.set_budget(ENOUGH_BYTES)
                measured["resident_tps"] = _turn(model, f"{turn}. {PROMPT} ", spec["tokens"])["tps"]
                model.set_budget(spec["memory"])
            if turn:  # the first warms up
                turns.append(measured)
                raw_speeds.append(max(speeds))
        demand = plan.demand
        fixed = demand.total_bytes - demand.kv_bytes - demand.constants_bytes
        room = plan.budget_bytes - fixed - demand.kv_bytes - plan.slots_bytes - demand.constants_bytes
        return {
            "streams": True,
            "pass_bytes": plan.pass_bytes,
            "planned_bytes": plan.streamed_bytes,
            "bound_bytes": 1.03 * max(0, plan.pass_bytes - room),
            "fixed_bytes": fixed,
            "slots_bytes": plan.slots_bytes,
            "unused_percent": 100 * (plan.budget_bytes - plan.planned_bytes) / (plan.budget_bytes - demand.total_bytes),
            "peak_bytes": turns[-1]["peak_bytes"],
            "predicted_tps": plan.predicted_decode_tps,
            "turns": turns,
            "raw_bytes_per_s": raw_speeds,
        }


def _turn(model: edgelm.Model, prompt: str, n_tokens: int) -> dict[str, Any]:
    """Decode `n_tokens`; count bytes and seconds from the first token to the last."""
    first = last = None
    for chunk in model.stream(prompt, max_tokens=n_tokens, ignore_eos=True):
        if chunk.token_id is not None:
            now = (time.perf_counter(), chunk.usage)
            first, last = first or now, now
    assert first is not None
    assert last is not None
    seconds, passes = last[0] - first[0], n_tokens - 1
    n_bytes = last[1].bytes_streamed - first[1].bytes_streamed
    return {
        "bytes_per_pass": n_bytes / passes,
        "bytes_per_s": n_bytes / seconds,
        "tps": passes / seconds,
        "peak_bytes": last[1].peak_bytes,
    }


def main() -> None:
    parser = common.arguments(__doc__, rounds=5)
    parser.add_argument("--tokens", type=int, default=33, help="of each turn")
    parser.add_argument("--budgets", nargs="*", type=int, help="MB; default: four for each model")
    parser.add_argument("--context", type=int, help="default: 1024 for SmolLM2, 2048 for Gemma")
    args = parser.parse_args()
    report = common.Report(
        "streaming",
        {"threads": args.threads, "backend": "llamacpp", "rounds": args.rounds, "tokens": args.tokens},
    )
    for name in args.models:
        model, context = common.find_model(name), args.context or common.CONTEXTS.get(name, 2048)
        spec = {
            "model": str(model), "threads": args.threads, "context": context, "tokens": args.tokens,
            "rounds": args.rounds,
        }  # fmt: skip
        for budget in args.budgets or BUDGETS_MB.get(name, (500, 700)):
            found = common.answer_of_child(__file__, {**spec, "memory": budget * common.MB})
            _report(report, name, budget, found)
    report.finish()


def _report(report: common.Report, name: str, budget: int, found: dict[str, Any]) -> None:
    if not found["streams"]:
        report.add("Streamed decode", model=name, **{"budget MB": budget, "note": "everything fits"})
        return
    per_pass = common.middle(turn["bytes_per_pass"] for turn in found["turns"])
    speed = common.middle(turn["bytes_per_s"] for turn in found["turns"])
    raw = common.middle(found["raw_bytes_per_s"])
    ratios = [turn["bytes_per_s"] / r for turn, r in zip(found["turns"], found["raw_bytes_per_s"], strict=True)]
    tps, flash_tps = common.middle(turn["tps"] for turn in found["turns"]), raw / per_pass
    resident = common.middle(turn["resident_tps"] for turn in found["turns"])
    slower = [
        max(1 / turn["resident_tps"], per_pass / one) * turn["tps"]
        for turn, one in zip(found["turns"], found["raw_bytes_per_s"], strict=True)
    ]
    report.add(
        "Streamed decode",
        model=name,
        **{
            "budget MB": budget,
            "pass MB": common.mb(found["pass_bytes"]),
            "read MB/pass": common.mb(per_pass),
            "bound MB/pass": common.mb(found["bound_bytes"]),
            "bytes held": per_pass <= found["bound_bytes"],
            "MB/s in the pass": speed / 1e6,
            "raw MB/s": raw / 1e6,
            "of raw %": 100 * common.middle(ratios),
            "tok/s": tps,
            "flash allows": flash_tps,
            "compute allows": resident,
            "bound by": "flash" if flash_tps < resident else "compute",
            "time / the slower": 1 / common.middle(slower),
            "slots MB": common.mb(found["slots_bytes"]),
            "unused of weights %": found["unused_percent"],
            "predicted": found["predicted_tps"],
            "peak MB": common.mb(found["peak_bytes"]),
        },
        detail=found,
    )


if __name__ == "__main__":
    common.main_or_child(main, child)
