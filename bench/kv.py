"""What types of keys and values cost: memory, perplexity, and speed of decoding behind a filled context.

python bench/kv.py [--tokens 3000]
"""

from __future__ import annotations

import math
from typing import Any

import common

TYPES = ("f16", "q8_0", "q8_0:q4_0", "q4_0")
CONTEXT = 1024


def child(spec: dict[str, Any]) -> dict[str, Any]:
    """Score stretches of text that fill the context, if that is asked for, then decode behind one of them."""
    import edgelm

    with edgelm.load(
        spec["model"], backend="llamacpp", threads=spec["threads"], context=CONTEXT, kv=spec["kv"], speculate=True
    ) as model:
        ids = model.tokenizer.encode(common.prose(), add_bos=False)[: spec["tokens"]]
        total, n = 0.0, 0
        for first in range(0, len(ids), CONTEXT - 1) if spec["score"] else ():
            stretch = ids[first : first + CONTEXT - 1]
            score = model.score_ids([model.tokenizer.bos_id or ids[0], *stretch], 1)
            total, n = total + score.total, n + len(score.logprobs)
        prompt = ids[: CONTEXT - 140]
        chunks = list(model.stream_ids(prompt, max_tokens=128, ignore_eos=True, speculate=False))
        return {
            "perplexity": math.exp(-total / n) if n else None,
            "tokens": n,
            "kv_bytes": model.plan.demand.kv_bytes,
            "decode_tps": chunks[-1].usage.decode_tps,
        }


def main() -> None:
    parser = common.arguments(__doc__, rounds=3)
    parser.add_argument("--tokens", type=int, default=3000)
    given = parser.parse_args()
    conditions = {"backend": "llamacpp", "threads": given.threads, "context": CONTEXT, "budget": "not limited"}
    report = common.Report("kv", conditions)
    for name in given.models:
        found: dict[str, list[dict[str, Any]]] = {kv: [] for kv in TYPES}
        for turn in range(given.rounds):
            for kv in TYPES:
                spec = {"model": str(common.find_model(name)), "kv": kv, "threads": given.threads}
                spec |= {"tokens": given.tokens, "score": turn == 0}  # the numbers are the same each time
                found[kv].append(common.answer_of_child(__file__, spec))
        plain = found["f16"][0]
        plain_tps = common.middle(row["decode_tps"] for row in found["f16"])
        for kv in TYPES:
            row = found[kv][0]
            decode_tps = common.middle(one["decode_tps"] for one in found[kv])
            report.add(
                "types of keys and values",
                model=name,
                kv=kv,
                tokens=row["tokens"],
                **{
                    "KV MB": common.mb(row["kv_bytes"]),
                    "memory": round(row["kv_bytes"] / plain["kv_bytes"], 4),
                    "perplexity": round(row["perplexity"], 4),
                    "perplexity %": round(100 * (row["perplexity"] / plain["perplexity"] - 1), 3),
                    "decode tok/s": round(decode_tps, 1),
                    "speed": round(decode_tps / plain_tps, 3),
                },
            )
    report.finish()


if __name__ == "__main__":
    common.main_or_child(main, child)
