"""llama.cpp, through llama-cpp-python, to be measured beside edgelm: a context, ids in, logits out.

Calls `llama_decode` itself: the fastest that the library can be driven from Python, so that no overhead of its
high-level loop is counted against it. Measures nothing.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
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

    def __init__(self, model: str, *, threads: int, context: int, batch: int = 512, flash_attn: bool = False) -> None:
        self.batch = batch
        self._llama = llama_cpp.Llama(
            model, n_ctx=context, n_batch=batch, n_threads=threads, n_threads_batch=threads, flash_attn=flash_attn,
            verbose=False,
        )  # fmt: skip
        self._ctx = self._llama._ctx.ctx
        self.n_vocab: int = self._llama.n_vocab()
        self._memory = api.llama_get_memory(self._ctx)

    def tokenize(self, text: str) -> list[int]:
        return list(self._llama.tokenize(text.encode(), add_bos=True, special=False))

    def clear(self) -> None:
        api.llama_memory_clear(self._memory, True)

    def decode(self, ids: Sequence[int]) -> np.ndarray[Any, np.dtype[np.float32]]:
        """Append `ids`; return the logits of the last, valid until the next call."""
        for start in range(0, len(ids), self.batch):
            part = ids[start : start + self.batch]
            tokens = (api.llama_token * len(part))(*part)
            code = api.llama_decode(self._ctx, api.llama_batch_get_one(tokens, len(part)))
            if code != 0:
                raise RuntimeError(f"llama_decode returned {code}")
        pointer = ctypes.cast(api.llama_get_logits_ith(self._ctx, -1), ctypes.POINTER(ctypes.c_float))
        return np.ctypeslib.as_array(pointer, (self.n_vocab,))
