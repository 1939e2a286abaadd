"""How soon the first token comes when a system message of 1,000 tokens is kept on flash: two processes, in turn.

python bench/prefix.py [--tokens 1000]
"""

from __future__ import annotations

from typing import Any

import common

CONTEXT = 2048


def child(spec: dict[str, Any]) -> dict[str, Any]:
    """Load, answer one question, and say when the first token came, loading included and not."""
    import time

    began_s = time.perf_counter()
    import edgelm

    with edgelm.load(spec["model"], backend=spec["backend"], threads=spec["threads"], context=CONTEXT) as model:
        loaded_s = time.perf_counter()
        chat = model.chat(spec["system"], keep=spec["keep"])
        chunk = next(chat.stream("What is this about?", max_tokens=8))
        first_s = time.perf_counter()
        return {
            "token": chunk.token_id,
            "prompt_tokens": chunk.usage.prompt_tokens,
            "cached": chunk.usage.cached_tokens,
            "first_s": first_s - loaded_s,
            "with_loading_s": first_s - began_s,
        }


def main() -> None:
    from edgelm_models.cache import remove_prefixes

    parser = common.arguments(__doc__, rounds=5)
    parser.add_argument("--tokens", type=int, default=1000)
    parser.add_argument("--backends", nargs="+", default=["onnx", "llamacpp"])
    given = parser.parse_args()
    report = common.Report("prefix", {"threads": given.threads, "context": CONTEXT, "budget": "not limited"})
    for name in given.models:
        model = common.find_model(name)
        system = common.text_of(model, given.tokens)
        for backend in given.backends:
            remove_prefixes()
            found: dict[bool, list[dict[str, Any]]] = {False: [], True: []}
            for turn in range(given.rounds + 1):
                for keep in (False, True):
                    spec = {"model": str(model), "backend": backend, "threads": given.threads}
                    spec |= {"system": system, "keep": keep}
                    row = common.answer_of_child(__file__, spec)
                    if turn:  # the first one writes the file
                        found[keep].append(row)
            times = {
                (keep, key): common.middle(row[key] for row in rows)
                for keep, rows in found.items()
                for key in ("first_s", "with_loading_s")
            }
            report.add(
                "first token of a new process",
                model=name,
                backend=backend,
                **{
                    "prompt": found[True][0]["prompt_tokens"],
                    "of these from flash": found[True][0]["cached"],
                    "computed s": round(times[False, "first_s"], 4),
                    "kept s": round(times[True, "first_s"], 4),
                    "times sooner": round(times[False, "first_s"] / times[True, "first_s"], 2),
                    "with loading": round(times[False, "with_loading_s"] / times[True, "with_loading_s"], 2),
                    "same token": found[True][0]["token"] == found[False][0]["token"],
                },
            )
    remove_prefixes()
    report.finish()


if __name__ == "__main__":
    common.main_or_child(main, child)
