"""What approximate attention costs and saves at a long prompt: likelihood, facts found again, time, memory.

python bench/approximate.py [--kept 1.0 0.5 0.25]

Each side is a process of its own. The likelihood is that of the 256 tokens which follow 1,792 of prose, as written. A
needle is a sentence with a fact somewhere in as much prose, which the end of the prompt asks for.
"""

from __future__ import annotations

import json
import math
import sys
import time
from typing import Any

import common

CONTEXT, N_PROMPT, N_NEXT = 2048, 1792, 256
FACTS = ("4925", "6380", "2716", "8153", "3094", "7542")
NEEDLE = "The password of the old library is {}."
QUESTION = "What is the password of the old library?"
"""One that exact attention finds, and another sentence than the one by which `edgelm.engine.filtering` was set up."""
ANSWER_TOKENS = 20


def child(spec: dict[str, Any]) -> dict[str, Any]:
    """Score a continuation, look for needles, and say what it took."""
    import edgelm

    options = {key: spec[key] for key in ("attention", "kept") if spec.get(key) is not None}
    with edgelm.load(
        spec["model"], backend=spec["backend"], threads=spec["threads"], context=CONTEXT, speculate=False, **options
    ) as model:
        prose = common.prose()
        ids = model.tokenizer.encode(prose)
        scores = [model.score_ids(ids[first:][: N_PROMPT + N_NEXT], N_PROMPT) for first in spec["firsts"]]
        answers, usages, processor_s = [], [], []
        for i, fact in enumerate(FACTS[: spec["needles"]]):
            began_s = time.process_time()
            stream = model.stream_ids(_haystack(model, prose, fact, i / spec["needles"]), max_tokens=ANSWER_TOKENS)
            chunks = [next(stream)]
            processor_s.append(time.process_time() - began_s)
            chunks += stream
            answers.append("".join(chunk.text for chunk in chunks))
            usages.append(chunks[-1].usage)
        return {
            "logprobs": [value for score in scores for value in score.logprobs],
            "answers": answers,
            "found": sum(fact in answer for fact, answer in zip(FACTS, answers, strict=False)),
            "ttft_s": common.middle(usage.ttft_s for usage in usages),
            "first_processor_s": common.middle(processor_s),
            "decode_tps": common.middle(usage.decode_tps for usage in usages),
            "spilled_bytes": sum(usage.kv_bytes_spilled for usage in usages) // len(usages),
            "prompt_tokens": usages[0].prompt_tokens,
            "kv_bytes": model.plan.demand.kv_bytes,
            "n_kept": model.plan.demand.n_kept,
            "approximate": model.plan.approximate,
        }


def _haystack(model: Any, prose: str, fact: str, depth: float) -> list[int]:
    """Return a prompt of about `N_PROMPT` tokens with a needle at a depth between 0 and 1."""
    start = int(depth * 300)  # other needles lie in other hay
    words = prose.split(" ")[start:]
    n_words = N_PROMPT
    while True:
        at = int(n_words * (0.05 + 0.9 * depth))
        text = " ".join([*words[:at], NEEDLE.format(fact), *words[at:n_words]]) + f"\n\n{QUESTION}"
        ids: list[int] = model.tokenizer.encode_prompt(model.template.render([{"role": "user", "content": text}]))
        if len(ids) <= N_PROMPT:
            return ids
        n_words -= max((len(ids) - N_PROMPT) // 2, 1)


def main() -> None:
    parser = common.arguments(__doc__, rounds=1, models=("smollm2-135m-instruct",))
    parser.add_argument("--kept", nargs="+", type=float, default=[1.0, 0.5, 0.25])
    parser.add_argument("--attention", nargs="+", default=["important", "filtered"])
    parser.add_argument("--needles", type=int, default=len(FACTS))
    parser.add_argument("--firsts", nargs="+", type=int, default=[0, 1024], help="where scored stretches begin")
    parser.add_argument("--backend", default="llamacpp")
    given = parser.parse_args()
    conditions = {
        "backend": given.backend, "threads": given.threads, "context": CONTEXT, "prompt": N_PROMPT,
        "scored": N_NEXT * len(given.firsts), "needles": given.needles, "budget": "not limited",
    }  # fmt: skip
    report = common.Report("approximate", conditions)
    kinds: list[tuple[str, float | None]] = [("exact", None)]
    kinds += [(attention, kept) for attention in given.attention for kept in given.kept]
    for name in given.models:
        spec = {"model": str(common.find_model(name)), "threads": given.threads, "backend": given.backend}
        spec |= {"needles": given.needles, "firsts": given.firsts}
        exact: dict[str, Any] = {}
        for attention, kept in kinds:
            found: list[dict[str, Any]] = []
            for _ in range(given.rounds):
                asked = json.dumps({**spec, "attention": attention, "kept": kept})
                found.append(common.run([sys.executable, __file__, "--child", asked]).json())
            row = found[0]
            exact = exact or row
            mean, plain = (math.fsum(one["logprobs"]) / len(one["logprobs"]) for one in (row, exact))
            report.add(
                "approximate attention",
                model=name,
                attention=attention,
                kept=kept,
                **{
                    "tokens kept": row["n_kept"] or row["prompt_tokens"],
                    "same as exact": row["logprobs"] == exact["logprobs"] and row["answers"] == exact["answers"],
                    "KV MB": common.mb(row["kv_bytes"]),
                    "KV": round(row["kv_bytes"] / exact["kv_bytes"], 3),
                    "log-likelihood": round(mean, 4),
                    "perplexity": round(math.exp(-mean), 3),
                    "perplexity %": round(100 * (math.exp(plain - mean) - 1), 2),
                    "needles": f"{row['found']} of {given.needles}",
                    "first token s": round(common.middle(one["ttft_s"] for one in found), 2),
                    "processor s": round(common.middle(one["first_processor_s"] for one in found), 2),
                    "decode tok/s": round(common.middle(one["decode_tps"] for one in found), 1),
                    "written to flash MB": common.mb(row["spilled_bytes"]),
                    "answers": row["answers"],
                },
            )
    report.finish()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        print(json.dumps(child(json.loads(sys.argv[2]))))
    else:
        main()
