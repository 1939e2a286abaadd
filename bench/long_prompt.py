"""A prompt of 8,000 tokens in a budget that holds a quarter of its keys and values, against room for all of them.

Each side is a process of its own: greedy tokens compared one by one, peak memory (VmHWM), and a memory cgroup as large
as the budget around the small side. The speed of flash alone is taken in the same process at the end: the same reads in
the same order, without computing. Tokens that part are shown with how close the two best logits were.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import common

import edgelm
from edgelm.errors import BudgetTooSmall
from edgelm.memory.spill_shape import PLACES
from edgelm_apps import limited

CONTEXT, N_PROMPT, N_TOKENS = 8192, 8000, 160
SHARE = 4
PASSES = 5
SLACK = 500_000
"""What processes differ by."""


def child(spec: dict[str, Any]) -> dict[str, Any]:
    """Answer within one budget, or find out about budgets without answering (`find`)."""
    options = {"speculate": False, **{key: spec[key] for key in ("context", "threads", "backend")}}
    if spec.get("find") == "floor":
        return {"bytes": floor(spec["model"], options)}
    if spec.get("find") == "excess":
        return {"bytes": excess_bytes(spec["model"], spec["memory"], options)}
    with edgelm.load(spec["model"], memory=spec["memory"], **options) as model:
        ids = model.tokenizer.encode(spec["prompt"])
        margins: list[float] = []

        def watch(history: Any, logits: Any) -> Any:
            best = sorted(logits[logits.argpartition(-2)[-2:]])
            margins.append(float(best[1] - best[0]))
            return logits

        chunks = list(model.stream_ids(ids, max_tokens=spec["tokens"], ignore_eos=True, processors=[watch]))
        usage = chunks[-1].usage
        return {
            "token_ids": [chunk.token_id for chunk in chunks if chunk.token_id is not None],
            "margins": margins,
            "prompt_tokens": usage.prompt_tokens,
            "prefill_tps": usage.prefill_tps,
            "decode_tps": usage.decode_tps,
            "predicted_tps": usage.predicted_decode_tps,
            "kv_spilled_bytes": usage.kv_bytes_spilled,
            "kv_read_bytes": usage.kv_bytes_read,
            "peak_bytes": usage.peak_bytes,
            "plan": model.plan.as_dict(),
            "flash_alone_tps": flash_alone_tps(model._engine),
            "notes": model.notes,
        }


def floor(model: str, options: dict[str, Any]) -> int:
    """Return the smallest budget that holds all keys and values."""
    try:
        edgelm.plan(model, memory=1, spill=False, **options)
    except BudgetTooSmall as error:
        return error.needed_bytes
    raise AssertionError("a budget of one byte was enough")


def excess_bytes(model: str, memory: int, options: dict[str, Any]) -> int:
    """Return by how much the budget is more than a plan with just a quarter of the keys and values needs."""
    plan = edgelm.plan(model, memory=memory, **options)
    spill = plan.demand.spill
    assert spill is not None
    assert not plan.streamed, "weights stream where the whole cache just does not fit: no budget has a quarter only"
    return memory - plan.planned_bytes + (spill.n_blocks - CONTEXT // SHARE // PLACES) * spill.step_bytes


def flash_alone_tps(engine: Any) -> float | None:
    """Return how many passes a second the reads of keys and values alone would allow."""
    if engine.spilled is None:
        return None
    cache, engine_past = engine.spilled.cache, engine.n_past - 1
    began = time.perf_counter()
    for _ in range(PASSES):
        cache.begin(engine_past, 1)
        for layer in sorted(engine.spilled.layers):
            for blocks in cache.blocks(layer):
                cache.release(blocks)
    return PASSES / (time.perf_counter() - began)


def compare(roomy: dict[str, Any], small: dict[str, Any]) -> dict[str, Any]:
    pairs = list(zip(roomy["token_ids"], small["token_ids"], strict=True))
    first = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
    return {
        "same_tokens": first is None,
        "of": len(pairs),
        "first_difference": first,
        "margin_there": roomy["margins"][first] if first is not None else None,
    }


def measure(report: common.Report, model: Path, threads: int, backend: str) -> None:
    spec = {"model": str(model), "context": CONTEXT, "threads": threads, "backend": backend, "tokens": N_TOKENS}
    spec["prompt"] = common.text_of(model, N_PROMPT)
    argv = [sys.executable, str(Path(__file__).resolve())]

    def run(memory: int, **more: str) -> list[str]:
        return [*argv, json.dumps({**spec, **more, "memory": memory})]

    budget = int(common.run(run(0, find="floor")).json()["bytes"]) - 4 * SLACK
    for _ in range(3):  # children differ by a few hundred kilobytes
        excess = int(common.run(run(budget, find="excess")).json()["bytes"])
        budget -= excess - SLACK
    roomy = common.run(run(4_000_000_000)).json()
    finished = common.run(run(budget))
    small = finished.json()
    for name, side in (("room for all", roomy), ("a quarter", small)):
        report.add(
            "sides",
            model=model.stem,
            backend=backend,
            side=name,
            budget_mb=common.mb(side["plan"]["budget_bytes"]),
            peak_mb=common.mb(side["peak_bytes"]),
            within=side["peak_bytes"] <= side["plan"]["budget_bytes"],
            tokens_in_memory=side["plan"]["kv_resident_tokens"],
            prefill_tps=side["prefill_tps"],
            decode_tps=side["decode_tps"],
            predicted_tps=side["predicted_tps"],
            flash_alone_tps=side["flash_alone_tps"],
            kv_spilled_mb=common.mb(side["kv_spilled_bytes"]),
            kv_read_mb=common.mb(side["kv_read_bytes"]),
        )
    report.add("tokens", model=model.stem, backend=backend, **compare(roomy, small))
    try:
        limited.evict(model)
        inside = limited.run(run(budget), budget)
    except limited.NoCgroup as error:
        report.add("cgroup", model=model.stem, backend=backend, skipped=str(error))
        return
    same = json.loads(inside.stdout)["token_ids"] == small["token_ids"] if inside.exit_code == 0 else False
    report.add("cgroup", model=model.stem, backend=backend, same_tokens=same, **inside.as_dict())


def main() -> None:
    parser = common.arguments(__doc__, rounds=1, models=("smollm2-135m-instruct",))
    parser.add_argument("--backend", nargs="+", default=["llamacpp"])
    given = parser.parse_args()
    conditions = {"prompt tokens": N_PROMPT, "answer": N_TOKENS, "context": CONTEXT, "threads": given.threads}
    report = common.Report("long_prompt", conditions)
    for name in given.models:
        for backend in given.backend:
            measure(report, common.find_model(name), given.threads, backend)
    report.finish()


if __name__ == "__main__":
    if len(sys.argv) == 2 and sys.argv[1].startswith("{"):
        print(json.dumps(child(json.loads(sys.argv[1]))))
    else:
        main()
