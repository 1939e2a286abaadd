"""What guessing brings, and that it changes nothing: paired speeds, and greedy ids beside those of plain decoding.

    python bench/speculation.py --part resident|streamed|drafted|identity [--per-kind 3] [--tokens 96]

Each child answers every prompt plainly and with guesses, in turn, `--rounds` times. `resident` answers plainly once
more in every round: two plain answers differ by what the machine does to any ratio here. `identity` then goes through
the plain answer with guesses, and counts a flip wherever another token was the likeliest, and where the answer with
guesses first went another way, with the gap between the two best log-probabilities there. `drafted` compares with plain
decoding that has the memory of the draft for weights.
"""

from __future__ import annotations

import json
import math
from typing import Any

import common
import f32_models

KINDS = ("copy", "summarise", "edit", "answer", "chat", "story", "list")
COPYING = ("copy", "summarise", "edit", "answer")
BACKENDS = ("onnx", "llamacpp")
CONTEXT = 1024
NOISE = 1.0
"""Gap of log-probabilities below which another width of the pass may turn the order: logits move by up to this."""


def prompts(kinds: list[str], per_kind: int) -> list[dict[str, str]]:
    found = []
    for kind in kinds:
        lines = (common.HERE / "prompts" / f"{kind}.jsonl").read_text().splitlines()
        found += [json.loads(line) for line in lines[:per_kind]]
    return found


def child(spec: dict[str, Any]) -> list[dict[str, Any]]:
    import edgelm
    from edgelm.sequences import n_common

    options = {key: spec[key] for key in ("memory", "backend", "threads", "draft") if spec.get(key) is not None}
    rows = []
    with edgelm.load(spec["model"], context=CONTEXT, **options) as model:
        for prompt in prompts(spec["kinds"], spec["per_kind"]):
            messages = [{"role": role, "content": prompt[role]} for role in ("system", "user")]
            ids = model.tokenizer.encode_prompt(model.template.render(messages))
            tps: dict[bool, list[float]] = {False: [], True: []}
            again_tps = []
            whole_s: dict[bool, list[float]] = {False: [], True: []}
            for _ in range(spec["rounds"]):
                plain, gaps, usage = _answer(model, ids, spec["tokens"], speculate=False, watched=spec["identity"])
                tps[False].append(usage.decode_tps)
                whole_s[False].append(usage.elapsed_s)
                guessed, _, usage = _answer(model, ids, spec["tokens"])
                tps[True].append(usage.decode_tps)
                whole_s[True].append(usage.elapsed_s)
                if spec["again"]:
                    again_tps.append(_answer(model, ids, spec["tokens"], speculate=False)[2].decode_tps)
            flips = _flips(model, ids, plain, gaps) if spec["identity"] else []
            if spec["identity"] and plain != guessed:
                flips.append(round(gaps[n_common(plain, guessed)], 4))
            rows.append(
                {
                    "id": prompt["id"],
                    "kind": prompt["kind"],
                    "plain_tps": common.middle(tps[False]),
                    "guessed_tps": common.middle(tps[True]),
                    "again_tps": common.middle(again_tps) if again_tps else None,
                    "plain_s": common.middle(whole_s[False]),
                    "guessed_s": common.middle(whole_s[True]),
                    "per_pass": usage.tokens_per_pass,
                    "drafted": usage.drafted_tokens,
                    "accepted": usage.accepted_tokens,
                    "tokens": len(plain),
                    "same": plain == guessed,
                    "flips": flips,
                    "peak_bytes": usage.peak_bytes,
                    "streamed": model.plan.streamed_bytes,
                    "budget_bytes": usage.budget_bytes,
                    "backend": usage.backend,
                }
            )
    return rows


def _answer(
    model: Any, ids: list[int], n: int, *, speculate: bool = True, watched: bool = False, **options: Any
) -> tuple[list[int], list[float], Any]:
    model._conversation.forget_after(0)  # a prompt that is there already ends in a pass of another width
    options |= {"logprobs": 2} if watched else {}
    chunks = list(model.stream_ids(ids, max_tokens=n, ignore_eos=True, speculate=speculate, **options))
    gaps = [chunk.logprobs.top[0][1] - chunk.logprobs.top[1][1] for chunk in chunks if chunk.logprobs]
    return [chunk.token_id for chunk in chunks if chunk.token_id is not None], gaps, chunks[-1].usage


def _flips(model: Any, ids: list[int], plain: list[int], gaps: list[float]) -> list[float]:
    """Go through the plain answer with guesses, and return the gap wherever another token was the likeliest."""
    flips = []

    def follow(history: Any, logits: Any) -> Any:
        at = len(history) - len(ids)
        if int(logits.argmax()) != plain[at]:
            flips.append(round(gaps[at], 4))
        logits[plain[at]] = math.inf
        return logits

    _answer(model, ids, len(plain), processors=[follow])
    return flips


def _plain_twice(rows: list[dict[str, Any]]) -> dict[str, list[float]]:
    """What the same comparison says of plain decoding and itself, where it was measured."""
    ratios = sorted(row["again_tps"] / row["plain_tps"] for row in rows if row["again_tps"])
    return {"ratios of plain to itself": [round(ratio, 3) for ratio in ratios]} if ratios else {}


def settings(part: str, names: list[str], backends: list[str]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for name in names:
        model = common.find_model(name)
        if part == "resident":
            found += [{"model": str(model), "backend": backend, "memory": "2GB"} for backend in backends]
        elif part == "identity":
            budgets = ["2GB", *{"smollm2-135m-instruct": ["110MB"], "gemma-3-270m": ["150MB"]}.get(name, [])]
            found += [{"model": str(model), "backend": "llamacpp", "memory": memory} for memory in budgets]
            found.append({"model": str(model), "backend": "onnx", "memory": "2GB"})
        else:
            large = f32_models.made(name)
            one = {"model": str(large), "backend": "llamacpp", "memory": large.stat().st_size // 2}
            found.append(one | ({"draft": str(model)} if part == "drafted" else {}))
    return found


def main() -> None:
    parser = common.arguments(__doc__, rounds=1)
    parser.add_argument("--part", choices=("resident", "streamed", "drafted", "identity"), required=True)
    parser.add_argument("--kinds", nargs="+", default=list(KINDS))
    parser.add_argument("--backends", nargs="+", default=list(BACKENDS), help="of `resident`")
    parser.add_argument("--per-kind", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--name", help="of the result, if it is not that of the part")
    given = parser.parse_args()
    conditions = {
        "threads": given.threads,
        "context": CONTEXT,
        "tokens": given.tokens,
        "prompts a kind": given.per_kind,
        "rounds": given.rounds,
    }
    report = common.Report(f"speculation_{given.name or given.part}", conditions)
    for setting in settings(given.part, given.models, given.backends):
        spec = setting | {"threads": given.threads, "kinds": given.kinds, "per_kind": given.per_kind}
        spec |= {"tokens": given.tokens, "rounds": given.rounds, "identity": given.part == "identity"}
        spec["again"] = given.part == "resident"
        rows = common.answer_of_child(__file__, spec)
        if given.part == "drafted":  # without the draft, plain decoding has its memory
            alone = common.answer_of_child(__file__, spec | {"draft": None})
            rows = [
                row | {key: other[key] for key in ("plain_tps", "plain_s")}
                for row, other in zip(rows, alone, strict=True)
            ]
        where = {"model": setting["model"].rpartition("/")[2], "backend": rows[0]["backend"]}
        where |= {"budget MB": common.mb(rows[0]["budget_bytes"]), "streamed MB": common.mb(rows[0]["streamed"])}
        if given.part == "identity":
            flips = sorted(flip for row in rows for flip in row["flips"])
            tokens = sum(row["tokens"] for row in rows)
            report.add(
                "greedy ids",
                **where,
                prompts=len(rows),
                tokens=tokens,
                **{
                    "prompts the same": sum(row["same"] for row in rows),
                    "flips at near ties": sum(flip < NOISE for flip in flips),
                    "other differences": sum(flip >= NOISE for flip in flips),
                    "one flip in": round(tokens / len(flips)) if flips else None,
                    "largest gap": flips[-1] if flips else None,
                    "all gaps": flips,
                },
            )
            continue
        for kind in given.kinds:
            of_kind = [row for row in rows if row["kind"] == kind]
            ratios = sorted(row["guessed_tps"] / row["plain_tps"] for row in of_kind)
            report.add(
                "speed",
                **where,
                kind=kind,
                **{
                    "plain tok/s": round(common.middle(row["plain_tps"] for row in of_kind), 2),
                    "guessed tok/s": round(common.middle(row["guessed_tps"] for row in of_kind), 2),
                    "ratio": round(common.middle(ratios), 3),
                    "least ratio": round(ratios[0], 3),
                    "ratio with the prompt": round(
                        common.middle(row["plain_s"] / row["guessed_s"] for row in of_kind), 3
                    ),
                    "tokens a pass": round(common.middle(row["per_pass"] for row in of_kind), 2),
                    "guesses right": round(
                        sum(row["accepted"] for row in of_kind) / max(sum(row["drafted"] for row in of_kind), 1), 3
                    ),
                    "peak MB": common.mb(max(row["peak_bytes"] for row in of_kind)),
                    "ratios": [round(ratio, 3) for ratio in ratios],
                    **_plain_twice(of_kind),
                },
            )
    report.finish()


if __name__ == "__main__":
    common.main_or_child(main, child)
