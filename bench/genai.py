"""Tokens a second of edgelm and onnxruntime-genai on the same model folder, in turn, within one run.

Decode: `--tokens` after a prompt of 16; prefill: a prompt of 512 (or what the model has room for). Each turn is a
process of its own, which warms up on one prompt and then measures others that share no prefix. Both sides run with the
same number of threads: one, and `--threads`; onnxruntime-genai by itself takes half of the logical cores, edgelm all
that are free. Peaks are the kernel's.

    python bench/genai.py FOLDER [FOLDER ...]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import median
from typing import Any

import common

N_SHORT, N_LONG = 16, 512
CHILD = Path(__file__).resolve()


def ours(spec: dict[str, Any]) -> list[dict[str, Any]]:
    """Measure edgelm: what a caller of `Model.stream_ids` sees."""
    import edgelm

    runs = []
    with edgelm.load(spec["folder"], threads=spec["threads"], context=spec["context"], memory=spec["memory"]) as model:
        for ids in spec["prompts"]:
            chunks = list(model.stream_ids(ids, max_tokens=spec["tokens"] + 1, ignore_eos=True))
            usage = chunks[-1].usage
            assert usage.cached_tokens == 0, "prompts must not share a prefix"
            tokens = [chunk.token_id for chunk in chunks if chunk.token_id is not None]
            runs.append({"decode_tps": usage.decode_tps, "prefill_tps": usage.prefill_tps, "tokens": tokens})
    return runs


def theirs(spec: dict[str, Any]) -> list[dict[str, Any]]:
    """Measure onnxruntime-genai: its generator, one token after the other, greedy."""
    import time

    import numpy as np
    import onnxruntime_genai as og

    config = og.Config(spec["folder"])
    options = {"intra_op_num_threads": spec["threads"]}
    config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
    model = og.Model(config)
    tokenizer = og.Tokenizer(model)
    runs = []
    for ids in spec["prompts"]:
        params = og.GeneratorParams(model)
        params.set_search_options(max_length=spec["context"], do_sample=False)
        generator, decoder = og.Generator(model, params), tokenizer.create_stream()
        began_s = time.perf_counter()
        generator.append_tokens(np.array([ids], np.int32))
        generator.generate_next_token()
        tokens = [int(generator.get_next_tokens()[0])]
        first_s = time.perf_counter()
        for _ in range(spec["tokens"]):
            generator.generate_next_token()
            tokens.append(int(generator.get_next_tokens()[0]))
            decoder.decode(tokens[-1])  # a caller wants text: edgelm's chunks have it, too
        last_s = time.perf_counter()
        tps = spec["tokens"] / (last_s - first_s) if spec["tokens"] else 0.0
        runs.append({"decode_tps": tps, "prefill_tps": len(ids) / (first_s - began_s), "tokens": tokens})
    return runs


def steps(spec: dict[str, Any]) -> dict[str, list[float]]:
    """Let both engines of one process step in turn, on one thread; return the processor time of every step.

    On a busy machine this says more than the clock. Which engine was loaded first matters for where its memory lies:
    the caller lets each be the first in turn.
    """
    import time

    import numpy as np
    import onnxruntime_genai as og

    import edgelm

    ids, n_tokens = spec["prompts"][0], spec["tokens"]
    nexts: dict[str, Any] = {}
    kept: list[Any] = []
    for who in spec["order"]:
        if who == "edgelm":
            model = edgelm.load(spec["folder"], threads=1, context=spec["context"], memory=spec["memory"])
            nexts[who] = model.stream_ids(ids, max_tokens=n_tokens + 2, ignore_eos=True).__next__
            kept.append(model)
        else:
            config = og.Config(spec["folder"])
            config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": 1}}}}))
            theirs_model = og.Model(config)
            params = og.GeneratorParams(theirs_model)
            params.set_search_options(max_length=spec["context"], do_sample=False)
            generator = og.Generator(theirs_model, params)
            generator.append_tokens(np.array([ids], np.int32))
            decoder = og.Tokenizer(theirs_model).create_stream()

            def step(generator: Any = generator, decoder: Any = decoder) -> str:
                generator.generate_next_token()
                return str(decoder.decode(generator.get_next_tokens()[0]))

            nexts[who] = step
    times: dict[str, list[float]] = {who: [] for who in nexts}
    for number in range(n_tokens):
        for who, advance in nexts.items():
            began_s = time.thread_time()
            advance()
            if number >= 4:
                times[who].append(time.thread_time() - began_s)
    return times


SIDES = {"edgelm": ours, "onnxruntime-genai": theirs}


def child(who: str, spec: dict[str, Any]) -> None:
    if who == "steps":
        print(json.dumps(steps(spec)))
        return
    runs = SIDES[who](spec)
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    print(json.dumps({"runs": runs, "peak_bytes": int(peak.split()[1]) * 1024}))


def turn(who: str, spec: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = common.run([sys.executable, str(CHILD), "--child", who, json.dumps(spec)]).json()
    return found


def prompts(n: int, n_tokens: int, n_vocab: int) -> list[list[int]]:
    """Return prompts of ids that share no beginning."""
    return [[(7919 * (i + 1) + 104729 * j) % (n_vocab - 100) + 50 for j in range(n_tokens)] for i in range(n)]


def measure(folder: Path, what: str, threads: int, args: Any, report: common.Report) -> None:
    config = json.loads((folder / "genai_config.json").read_text())["model"]
    context = min(config["context_length"], 1024)
    n_prompt, n_tokens = (N_SHORT, args.tokens) if what == "decode" else (min(N_LONG, context // 2), 0)
    spec = {
        "folder": str(folder), "threads": threads, "context": context, "memory": args.memory, "tokens": n_tokens,
        "prompts": prompts(args.repeats + 1, n_prompt, config["vocab_size"]),
    }  # fmt: skip
    speeds: dict[str, list[float]] = {who: [] for who in SIDES}
    peaks: dict[str, int] = {}
    tokens: dict[str, Any] = {}
    for _ in range(args.rounds):
        for who in SIDES:
            found = turn(who, spec)
            speeds[who].append(median(run[f"{what}_tps"] for run in found["runs"][1:]))
            peaks[who] = max(peaks.get(who, 0), found["peak_bytes"])
            tokens[who] = [run["tokens"] for run in found["runs"]]
    pairs = [zip(a, b, strict=True) for a, b in zip(*tokens.values(), strict=True)]
    same = [a == b for pair in pairs for a, b in pair]
    for who, values in speeds.items():
        report.add(
            f"{what}, tokens/s",
            model=folder.name,
            threads=threads,
            tokens=n_tokens or n_prompt,
            engine=who,
            median=median(values),
            lowest=min(values),
            highest=max(values),
            **{"edgelm / this": median(a / b for a, b in zip(speeds["edgelm"], values, strict=True))},
            peak_bytes=peaks[who],
            **{"same tokens": f"{sum(same)} of {len(same)}"},
            every=values,
        )


def measure_steps(folder: Path, args: Any, report: common.Report) -> None:
    config = json.loads((folder / "genai_config.json").read_text())["model"]
    context = min(config["context_length"], 1024)
    spec = {
        "folder": str(folder), "context": context, "memory": args.memory, "tokens": args.tokens,
        "prompts": prompts(1, N_SHORT, config["vocab_size"]),
    }  # fmt: skip
    medians: dict[str, list[float]] = {who: [] for who in SIDES}
    for number in range(args.rounds):
        order = list(SIDES) if number % 2 else list(SIDES)[::-1]
        for who, values in turn("steps", spec | {"order": order}).items():
            medians[who].append(1e6 * median(values))
    for who, values in medians.items():
        report.add(
            "processor time of a token, us: one process, one thread, in turn",
            model=folder.name,
            engine=who,
            mean=sum(values) / len(values),
            lowest=min(values),
            highest=max(values),
            **{"this / edgelm": sum(values) / sum(medians["edgelm"])},
            every=values,
        )


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2], json.loads(sys.argv[3]))
        return
    parser = common.arguments(__doc__, rounds=5)
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3, help="measured prompts of each process")
    parser.add_argument("--steps-only", action="store_true", help="only processor time: for a busy machine")
    parser.add_argument("--memory", default="2GB", help="budget of edgelm")
    args = parser.parse_args()
    conditions = {"threads": args.threads, "rounds": args.rounds, "repeats": args.repeats, "memory": args.memory}
    report = common.Report("genai", conditions)
    for folder in args.folders:
        measure_steps(folder.resolve(), args, report)
        for what in ("decode", "prefill") * (not args.steps_only):
            for threads in sorted({1, args.threads}):
                measure(folder.resolve(), what, threads, args, report)
    report.finish()


if __name__ == "__main__":
    main()
