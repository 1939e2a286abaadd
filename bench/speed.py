"""Tokens a second with everything resident: edgelm's llama.cpp backend against llama.cpp, in turn, within one run.

Decode: 128 tokens after a short prompt. Prefill: 512 tokens. Each turn is a process of its own: it warms up on one
prompt, then measures `--repeats` others that share no prefix. llama.cpp runs three ways: as llama-cpp-python sets it up
(weights repacked where it knows how), with plain buffers, in which the arithmetic is the same as edgelm's, and with
those and flash attention.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import common

N_DECODE, N_PREFILL, N_SHORT = 128, 512, 16
SIDES: dict[str, dict[str, Any]] = {
    "edgelm": {},
    "llama.cpp, default buffers": {},
    "llama.cpp, plain buffers": {"plain_buffers": True},
    "llama.cpp, plain, flash attention": {"plain_buffers": True, "flash_attn": True},
}
STARTS = ("One evening ", "Two sisters ", "Never again ", "After dinner ", "Winter: ", "Above all ", "Some say ")


def turn(who: str, model: Path, prompts: list[str], max_tokens: int, threads: int, context: int) -> list[Any]:
    """Return the measured runs of one process; the first, a warm-up, is left out."""
    spec: dict[str, Any] = {"model": model, "prompts": prompts, "max_tokens": max_tokens, "threads": threads}
    name = "ours" if who == "edgelm" else "peer"
    options = {"backend": "llamacpp"} if who == "edgelm" else SIDES[who]
    found = common.run(common.side(name, **spec, context=context, **options)).json()
    if who == "edgelm":
        assert found["plan"]["streamed_bytes"] == 0, "not everything is resident: free some memory"
        assert not any(run["cached_tokens"] > 1 for run in found["runs"]), "prompts must not share a prefix"
    return list(found["runs"][1:])


def main() -> None:
    parser = common.arguments(__doc__, rounds=5)
    parser.add_argument("--repeats", type=int, default=3, help="measured prompts of each process")
    args = parser.parse_args()
    report = common.Report(
        "speed",
        {"threads": args.threads, "budget": "default (all resident)", "rounds": args.rounds, "repeats": args.repeats},
    )
    starts = STARTS[: args.repeats + 1]
    for name in args.models:
        model = common.find_model(name)
        for what, n_prompt, max_tokens in (("decode", N_SHORT, N_DECODE), ("prefill", N_PREFILL, 1)):
            prompts = [common.text_of(model, n_prompt, start) for start in starts]
            speeds: dict[str, list[float]] = {who: [] for who in SIDES}
            for _ in range(args.rounds):
                for who in SIDES:
                    runs = turn(who, model, prompts, max_tokens, args.threads, 1024)
                    speeds[who].append(common.middle(run[f"{what}_tps"] for run in runs))
            _report(report, name, what, max_tokens if what == "decode" else n_prompt, speeds)
    report.finish()


def _report(report: common.Report, name: str, what: str, n: int, speeds: dict[str, list[float]]) -> None:
    ours = speeds["edgelm"]
    for who, values in speeds.items():
        ratios = [a / b for a, b in zip(ours, values, strict=True)]
        report.add(
            f"{what}, tokens/s",
            model=name,
            tokens=n,
            engine=who,
            median=common.middle(values),
            lowest=min(values),
            highest=max(values),
            **{"edgelm / this": common.middle(ratios)},
            every=values,
        )


if __name__ == "__main__":
    main()
