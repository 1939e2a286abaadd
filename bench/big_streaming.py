"""A 1.1 GB model in less memory than it has bytes: edgelm against llama.cpp's mmap in the same cgroup, cold, in turn.

Before every turn the whole page cache is dropped. Decode speed is from the first token to the last, on both sides.
The model has random weights in the shape of Qwen2.5-1.5B (see big_model.py).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import big_model
import common

from edgelm_apps import limited

DEFAULT = "llama.cpp, mmap and default (repacked) buffers"
PROMPT = "Once upon a time, in a village by the sea,"


def turn(who: str, model: Path, limit_mb: int, tokens: int, threads: int, context: int) -> dict[str, Any]:
    """Return speed and counters of one cold process inside the limit."""
    if who == "edgelm":
        argv = common.edgelm_run(
            model, PROMPT, max_tokens=tokens, threads=threads, context=context,
            memory_bytes=limit_mb * common.MB, backend="llamacpp",
        )  # fmt: skip
    else:
        # a small batch, so that buffers for prompts do not take the memory that weights need
        spec = {"model": model, "prompts": [PROMPT], "max_tokens": tokens, "threads": threads, "context": context}
        argv = common.side("peer", **spec, batch=32, plain_buffers=who != DEFAULT)
    limited.evict_everything()
    inside = limited.run(argv, limit_mb * common.MB)
    if inside.exit_code != 0:
        return {"failed": inside.stderr.strip()[-300:], **inside.as_dict()}
    answer = json.loads(inside.stdout)
    run = {**answer, **answer["stats"]} if who == "edgelm" else answer["runs"][0]
    kept = {key: run[key] for key in ("decode_tps", "ttft_s", "token_ids")}
    return {**kept, "bytes_streamed": run.get("bytes_streamed"), **inside.as_dict()}


def main() -> None:
    parser = common.arguments(__doc__, rounds=5, models=())
    parser.add_argument("--limits", nargs="+", type=int, default=[700, 500], help="MB")
    parser.add_argument("--tokens", type=int, default=17)
    parser.add_argument("--context", type=int, default=512)
    args = parser.parse_args()
    report = common.Report(
        "big_streaming",
        {"threads": args.threads, "rounds": args.rounds, "tokens": args.tokens, "context": args.context},
    )
    model = common.find_model(args.models[0]) if args.models else big_model.made()
    for limit_mb in args.limits:
        turns: dict[str, list[dict[str, Any]]] = {"edgelm": [], "llama.cpp, mmap": [], DEFAULT: []}
        for _ in range(args.rounds):
            for who, done in turns.items():
                done.append(turn(who, model, limit_mb, args.tokens, args.threads, args.context))
                print(limit_mb, who, {key: done[-1].get(key) for key in ("decode_tps", "failed")}, flush=True)
        _report(report, model, limit_mb, turns)
    report.finish()


def _report(report: common.Report, model: Path, limit_mb: int, turns: dict[str, list[dict[str, Any]]]) -> None:
    reference = turns["edgelm"][0].get("token_ids")
    worked = {who: [done for done in every if "failed" not in done] for who, every in turns.items()}
    medians = {who: common.middle(d["decode_tps"] for d in every) if every else None for who, every in worked.items()}
    theirs = medians["llama.cpp, mmap"]
    for who, every in turns.items():
        good, speed = worked[who], medians[who]
        report.add(
            f"{model.stat().st_size / 1e9:.2f} GB model in a cgroup, cold",
            **{
                "limit MB": limit_mb,
                "engine": who,
                "tok/s": speed,
                "of llama.cpp's": speed / theirs if speed and theirs else None,
                "lowest": min((d["decode_tps"] for d in good), default=None),
                "highest": max((d["decode_tps"] for d in good), default=None),
                "first token s": common.middle(d["ttft_s"] for d in good) if good else None,
                "whole process s": common.middle(d["wall_s"] for d in good) if good else None,
                "read MB/token": _per_token(good),
                "group peak MB": common.mb(max(d["peak_bytes"] for d in every)),
                "major faults": int(common.middle(d["major_faults"] for d in every)),
                "kills": sum(d["oom_kills"] for d in every),
                "failed": len(every) - len(good),
                "same ids": all(done.get("token_ids") == reference for done in every),
                "every": every,
            },
        )


def _per_token(done: list[dict[str, Any]]) -> float | None:
    streamed = [d["bytes_streamed"] / len(d["token_ids"]) for d in done if d.get("bytes_streamed")]
    return common.mb(common.middle(streamed)) if streamed else None


if __name__ == "__main__":
    main()
