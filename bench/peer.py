"""Generate with llama.cpp (through llama-cpp-python) in one process and print what was measured as JSON.

A child of the benchmarks; takes the largest logit. One JSON argument: `model`, `prompts`, `max_tokens`, `threads`,
`context`, and optionally `plain_buffers`, `flash_attn`, `batch`, `logits` (a file to write).
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import numpy as np

from edgelm_apps.peer import Peer, use_plain_buffers


def generate(peer: Peer, prompt: str, max_tokens: int, kept: list[np.ndarray] | None) -> dict[str, Any]:
    """Return greedy tokens and speeds; `kept` collects the logits that each token was taken from."""
    ids = peer.tokenize(prompt)
    peer.clear()
    began = time.perf_counter()
    logits = peer.decode(ids)
    prefilled = time.perf_counter()
    token_ids: list[int] = []
    while True:
        if kept is not None:
            kept.append(logits.copy())
        token_ids.append(int(logits.argmax()))
        if len(token_ids) == 1:
            first = time.perf_counter()
        if len(token_ids) == max_tokens:
            break
        logits = peer.decode(token_ids[-1:])
    last = time.perf_counter()
    return {
        "token_ids": token_ids,
        "prompt_tokens": len(ids),
        "ttft_s": first - began,
        "prefill_tps": len(ids) / (prefilled - began),
        "decode_tps": (max_tokens - 1) / (last - first) if max_tokens > 1 else 0.0,
    }


def main(spec: dict[str, Any]) -> dict[str, Any]:
    if spec.get("plain_buffers"):
        use_plain_buffers()
    options = {key: spec[key] for key in ("threads", "context", "batch", "flash_attn") if key in spec}
    peer = Peer(spec["model"], **options)
    kept: list[np.ndarray] | None = [] if spec.get("logits") else None
    runs = [generate(peer, prompt, spec["max_tokens"], kept) for prompt in spec["prompts"]]
    if kept is not None:
        np.save(spec["logits"], np.stack(kept))
    return {"runs": runs, "prompt_ids": [peer.tokenize(prompt) for prompt in spec["prompts"]]}


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
