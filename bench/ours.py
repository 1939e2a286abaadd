"""Generate with edgelm in one process, prompt after prompt, and print what was measured as JSON.

A child of the benchmarks; `peer.py` does the same with llama-cpp-python. One JSON argument:
`model`, `prompts`, `max_tokens`, `threads`, `context`, and optionally `memory`, `backend`.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import edgelm


def main(spec: dict[str, Any]) -> dict[str, Any]:
    options = {key: spec[key] for key in ("threads", "context", "memory", "backend") if spec.get(key) is not None}
    with edgelm.load(spec["model"], **options) as model:
        runs = [_generate(model, prompt, spec["max_tokens"]) for prompt in spec["prompts"]]
        return {"runs": runs, "plan": _plan(model.plan), "backend": model.backend, "peak_bytes": runs[-1]["peak_bytes"]}


def _generate(model: edgelm.Model, prompt: str, max_tokens: int) -> dict[str, Any]:
    chunks = list(model.stream(prompt, max_tokens=max_tokens, ignore_eos=True))
    usage = chunks[-1].usage
    return {
        "token_ids": [chunk.token_id for chunk in chunks if chunk.token_id is not None],
        "prompt_tokens": usage.prompt_tokens,
        "cached_tokens": usage.cached_tokens,
        "ttft_s": usage.ttft_s,
        "prefill_tps": usage.prefill_tps,
        "decode_tps": usage.decode_tps,
        "bytes_streamed": usage.bytes_streamed,
        "peak_bytes": usage.peak_bytes,
    }


def _plan(plan: edgelm.Plan) -> dict[str, Any]:
    demand = plan.demand
    return {
        "budget_bytes": plan.budget_bytes,
        "context": plan.context,
        "chunk": plan.chunk,
        "fixed_bytes": demand.total_bytes - demand.kv_bytes - demand.constants_bytes,
        "constants_bytes": demand.constants_bytes,
        "kv_bytes": demand.kv_bytes,
        "pinned_bytes": plan.pinned_bytes,
        "slots_bytes": plan.slots_bytes,
        "pass_bytes": plan.pass_bytes,
        "streamed_bytes": plan.streamed_bytes,
        "items": dict(plan.items()),
    }


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
