"""The ONNX and the llama.cpp backend on the same files, everything resident, in turn, within one run.

Decode: 128 tokens after a short prompt. Prefill: 512 tokens. T(4)/T(1): a pass over four tokens beside a pass over one,
with 64 tokens in the cache. Second start: a whole process from its start to its first token, the model prepared and in
the page cache. Each turn is a process of its own.
"""

from __future__ import annotations

import statistics
import sys
import time
from pathlib import Path
from typing import Any

import common
import startup
from speed import N_DECODE, N_PREFILL, N_SHORT, STARTS

BACKENDS = ("onnx", "llamacpp")
N_PASSES, N_BEFORE = 40, 64


def passes(spec: dict[str, Any]) -> dict[str, float]:
    """Return the median seconds of passes over one token and over four; a child's work."""
    from edgelm.engine.wishes import Wishes
    from edgelm.opening import open_engine

    engine = open_engine(spec["model"], Wishes(backend=spec["backend"], threads=spec["threads"], context=1024)).engine
    seconds: dict[int, list[float]] = {1: [], 4: []}
    ids = [int(token) for token in spec["ids"]]
    engine.forward(ids[:N_BEFORE])
    for i in range(2 * N_PASSES):
        n_tokens = (1, 4)[i % 2]
        began = time.perf_counter()
        engine.forward(ids[N_BEFORE + i :][:n_tokens])
        seconds[n_tokens].append(time.perf_counter() - began)
        engine.truncate(N_BEFORE)
    engine.close()
    return {str(n): statistics.median(values) for n, values in seconds.items()}


def main() -> None:
    parser = common.arguments(__doc__, rounds=5)
    parser.add_argument("--repeats", type=int, default=3, help="measured prompts of each process")
    args = parser.parse_args()
    report = common.Report(
        "backends",
        {"threads": args.threads, "budget": "default (all resident)", "rounds": args.rounds, "repeats": args.repeats},
    )
    for name in args.models:
        model = common.find_model(name)
        for what, n_prompt, max_tokens in (("decode", N_SHORT, N_DECODE), ("prefill", N_PREFILL, 1)):
            prompts = [common.text_of(model, n_prompt, start) for start in STARTS[: args.repeats + 1]]
            spec = {"model": model, "prompts": prompts, "max_tokens": max_tokens, "threads": args.threads}
            turns = _turns(args.rounds, lambda backend, spec=spec, what=what: _tps(what, spec, backend))
            _add(report, f"{what}, tokens/s", name, turns, higher=True)
        ratios = _turns(args.rounds, lambda backend, model=model: _ratio(model, backend, args.threads))
        _add(report, "T(4) / T(1)", name, ratios, higher=False)
        model.read_bytes()
        starts = _turns(args.rounds + 1, lambda backend, model=model: _start_s(model, backend, args.threads))
        _add(report, "Second start to first token, seconds", name, {who: s[1:] for who, s in starts.items()}, False)
    report.finish()


def _turns(rounds: int, measure: Any) -> dict[str, list[float]]:
    values: dict[str, list[float]] = {backend: [] for backend in BACKENDS}
    for _ in range(rounds):
        for backend in BACKENDS:
            values[backend].append(measure(backend))
    return values


def _tps(what: str, spec: dict[str, Any], backend: str) -> float:
    found = common.run(common.side("ours", **spec, context=1024, backend=backend)).json()
    assert found["plan"]["streamed_bytes"] == 0, "not everything is resident: free some memory"
    return common.middle(run[f"{what}_tps"] for run in found["runs"][1:])


def _ratio(model: Path, backend: str, threads: int) -> float:
    ids = list(range(1000, 1000 + N_BEFORE + 2 * N_PASSES + 4))
    spec = {"model": str(model), "backend": backend, "threads": threads, "ids": ids}
    found = common.answer_of_child(__file__, spec)
    return float(found["4"] / found["1"])


def _start_s(model: Path, backend: str, threads: int) -> float:
    code = startup.OURS.replace('backend="llamacpp"', "backend={backend!r}")
    code = code.format(model=str(model), threads=threads, prompt=startup.PROMPT, backend=backend)
    return startup.first_byte_s([sys.executable, "-c", code])[0]


def _add(report: common.Report, what: str, name: str, turns: dict[str, list[float]], higher: bool) -> None:
    theirs = turns["llamacpp"]
    for backend, values in turns.items():
        report.add(
            what,
            model=name,
            backend=backend,
            median=common.middle(values),
            lowest=min(values),
            highest=max(values),
            **{"this / llamacpp": common.middle(a / b for a, b in zip(values, theirs, strict=True))},
            better="higher" if higher else "lower",
            every=values,
        )


if __name__ == "__main__":
    common.main_or_child(main, passes)
