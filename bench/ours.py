"""Generate with edgelm in one process, prompt after prompt, and print what was measured as JSON.

A child of the benchmarks; `peer.py` does the same with llama-cpp-python. One JSON argument:
`model`, `prompts`, `max_tokens`, `threads`, `context`, and optionally `memory`, `backend`; with `teacher` (ids for each
prompt) those ids are taken instead of the likeliest, and the logits go to the file `logits`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from itertools import repeat
from typing import Any

import numpy as np

import edgelm


class Teacher:
    """A logits processor that keeps each row and lets only the next of the given ids pass."""

    def __init__(self, ids: Sequence[int], kept: list[Any]) -> None:
        self._ids, self._kept = iter(ids), kept

    def __call__(self, history: Sequence[int], logits: Any) -> Any:
        self._kept.append(logits.copy())
        logits[:] = -np.inf
        logits[next(self._ids)] = 0.0
        return logits


def main(spec: dict[str, Any]) -> dict[str, Any]:
    options = {key: spec[key] for key in ("threads", "context", "memory", "backend") if spec.get(key) is not None}
    with edgelm.load(spec["model"], **options) as model:
        kept: list[Any] = []
        teachers = [[Teacher(ids, kept)] for ids in spec["teacher"]] if "teacher" in spec else repeat([])
        runs = [
            _generate(model, prompt, spec["max_tokens"], processors)
            for prompt, processors in zip(spec["prompts"], teachers, strict=False)
        ]
        if kept:
            np.save(spec["logits"], np.stack(kept))
        return {"runs": runs, "plan": _plan(model.plan), "backend": model.backend, "peak_bytes": runs[-1]["peak_bytes"]}


def _generate(model: edgelm.Model, prompt: str, max_tokens: int, processors: Sequence[Teacher]) -> dict[str, Any]:
    chunks = list(model.stream(prompt, max_tokens=max_tokens, ignore_eos=True, processors=processors))
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
