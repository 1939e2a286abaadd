"""What `plan` predicts against what is measured: tokens a second, time to the first token, peak memory.

Models x budgets x flash (this machine's, and slower ones that are simulated by throttling reads); a process for each.
The context is filled, so that all of the planned memory is touched. The mean absolute error of each figure is the
result.
"""

from __future__ import annotations

from typing import Any

import common

import edgelm

N_PROMPT, N_ANSWER = 256, 32
BUDGETS_MB = {"smollm2-135m-instruct": (80, 100, 125, 250), "gemma-3-270m": (100, 150, 220, 400)}
DEVICES = (None, "laptop-sata", "phone-emmc")


def child(spec: dict[str, Any]) -> dict[str, Any]:
    """Predict and measure one configuration; the first turn warms up."""
    options = {key: spec[key] for key in ("memory", "threads", "context", "simulate")}
    with edgelm.load(spec["model"], backend="llamacpp", **options) as model:
        plan = model.plan
        for prompt in spec["prompts"]:
            chunks = list(model.stream(prompt, max_tokens=N_ANSWER, ignore_eos=True))
        usage = chunks[-1].usage
        return {
            "streams": bool(plan.streamed),
            "chunk": plan.chunk,
            "predicted": {
                "tok/s": plan.predicted_decode_tps,
                "first token s": plan.predicted_ttft_s(usage.prompt_tokens - usage.cached_tokens),
                "peak MB": common.mb(plan.planned_bytes),
            },
            "measured": {
                "tok/s": usage.decode_tps,
                "first token s": usage.ttft_s,
                "peak MB": common.mb(usage.peak_bytes),
            },
        }


def main() -> None:
    parser = common.arguments(__doc__, rounds=1)
    args = parser.parse_args()
    report = common.Report(
        "predict", {"threads": args.threads, "backend": "llamacpp", "prompt": N_PROMPT, "answer": N_ANSWER}
    )
    errors: dict[str, list[float]] = {}
    for name in args.models:
        model = common.find_model(name)
        prompts = [common.text_of(model, N_PROMPT, start) for start in ("Warm up. ", "One evening ")]
        for budget in BUDGETS_MB.get(name, (500, 700)):
            for device in DEVICES:
                spec = {
                    "model": str(model), "prompts": prompts, "threads": args.threads, "simulate": device,
                    "context": N_PROMPT + N_ANSWER, "memory": budget * common.MB,
                }  # fmt: skip
                _report(report, errors, name, budget, device, spec)
    for figure, values in errors.items():
        report.add("Mean absolute error", figure=figure, configurations=len(values), percent=sum(values) / len(values))
    report.finish()


def _report(
    report: common.Report, errors: dict[str, list[float]], name: str, budget: int, device: str | None, spec: Any
) -> None:
    found = common.answer_of_child(__file__, spec)
    row: dict[str, Any] = {"model": name, "budget MB": budget, "flash": device or "this machine's", **found}
    predicted, measured = row.pop("predicted"), row.pop("measured")
    for figure, value in measured.items():
        off = 100 * (predicted[figure] / value - 1)
        errors.setdefault(figure, []).append(abs(off))
        row |= {f"{figure} predicted": predicted[figure], f"{figure} measured": value, f"{figure} off %": off}
    report.add("Predicted and measured", **row)


if __name__ == "__main__":
    common.main_or_child(main, child)
