"""Generate with llama.cpp (through llama-cpp-python) in one process and print what was measured as JSON.

A child of the benchmarks. Calls `llama_decode` itself and takes the largest logit: the fastest that the library can
be driven from Python, so that no overhead of its high-level loop is counted against it. One JSON argument: `model`,
`prompts`, `max_tokens`, `threads`, `context`, and optionally `plain_buffers`, `flash_attn`, `batch`,
`logits` (a file to write).
"""

from __future__ import annotations

import ctypes
import json
import sys
import time
from typing import Any

import llama_cpp
import llama_cpp.llama_cpp as api
import numpy as np


def use_plain_buffers() -> None:
    """Make models load without "extra" (repacked) buffers; llama-cpp-python has no option for it."""
    defaults = api.llama_model_default_params

    def plain() -> Any:
        params = defaults()
        params.use_extra_bufts = False
        return params

    api.llama_model_default_params = plain


class Peer:
    """A loaded model and its context."""

    def __init__(self, spec: dict[str, Any]) -> None:
        self.batch = spec.get("batch", 512)
        self._llama = llama_cpp.Llama(
            spec["model"], n_ctx=spec["context"], n_batch=self.batch, n_threads=spec["threads"],
            n_threads_batch=spec["threads"], flash_attn=spec.get("flash_attn", False), verbose=False,
        )  # fmt: skip
        self._ctx = self._llama._ctx.ctx
        self.n_vocab = self._llama.n_vocab()
        self._memory = api.llama_get_memory(self._ctx)

    def tokenize(self, text: str) -> list[int]:
        return self._llama.tokenize(text.encode(), add_bos=True, special=False)

    def clear(self) -> None:
        api.llama_memory_clear(self._memory, True)

    def decode(self, ids: list[int]) -> np.ndarray:
        """Append `ids`; return the logits of the last, valid until the next call."""
        for start in range(0, len(ids), self.batch):
            part = ids[start : start + self.batch]
            tokens = (api.llama_token * len(part))(*part)
            code = api.llama_decode(self._ctx, api.llama_batch_get_one(tokens, len(part)))
            if code != 0:
                raise RuntimeError(f"llama_decode returned {code}")
        pointer = ctypes.cast(api.llama_get_logits_ith(self._ctx, -1), ctypes.POINTER(ctypes.c_float))
        return np.ctypeslib.as_array(pointer, (self.n_vocab,))


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
    peer = Peer(spec)
    kept: list[np.ndarray] | None = [] if spec.get("logits") else None
    runs = [generate(peer, prompt, spec["max_tokens"], kept) for prompt in spec["prompts"]]
    if kept is not None:
        np.save(spec["logits"], np.stack(kept))
    return {"runs": runs, "prompt_ids": [peer.tokenize(prompt) for prompt in spec["prompts"]]}


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
