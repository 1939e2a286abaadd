"""What is known of a generation while it runs: every chunk carries these statistics."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from edgelm.engine.forward import Engine
    from edgelm.engine.generate import FinishReason
    from edgelm.memory.meter import Meter


@dataclass(frozen=True, slots=True)
class Usage:
    """Statistics of one generation up to a chunk.

    `cached_tokens` of the prompt were still in the KV cache. `ttft_s` counts from the call, waiting in the queue
    included; `prefill_tps` and `decode_tps` are tokens a second, 0 until there is something to divide.
    `peak_bytes` is the peak of the process, `bytes_streamed` what this generation read from flash, `wait_s` how long
    it waited for reads. `simulated` names the device whose flash, threads and budget were simulated, if any.
    """

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    ttft_s: float
    prefill_tps: float
    decode_tps: float
    rss_bytes: int
    peak_bytes: int
    bytes_streamed: int
    wait_s: float
    budget_bytes: int
    predicted_decode_tps: float
    backend: str
    simulated: str | None = None


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of an answer. `token_id` is None in the last chunk, which has the `finish_reason`."""

    text: str
    token_id: int | None
    finish_reason: FinishReason | None
    usage: Usage


class Clock:
    """Takes the times of one generation."""

    def __init__(self, engine: Engine, meter: Meter, backend: str, prompt_tokens: int) -> None:
        self._engine, self._meter, self._backend = engine, meter, backend
        self._prompt_tokens, self._cached, self._computed, self._tokens = prompt_tokens, 0, 0, 0
        self._began = time.perf_counter()
        self._prefill_began = self._began
        self._prefill_s = self._first = self._last = 0.0
        self._streamed, self._waited = engine.window.bytes_streamed, engine.window.wait_s

    def started(self) -> None:
        """The queue is over: prefill begins."""
        self._prefill_began = time.perf_counter()
        self._streamed, self._waited = self._engine.window.bytes_streamed, self._engine.window.wait_s

    def prefilled(self, computed: int) -> None:
        """The prompt is in the cache; `computed` of its tokens had to be computed."""
        self._cached, self._computed = self._prompt_tokens - computed, computed
        self._prefill_s = time.perf_counter() - self._prefill_began

    def token(self) -> None:
        """A token was sampled."""
        self._last = time.perf_counter()
        self._first = self._first or self._last
        self._tokens += 1

    def usage(self) -> Usage:
        memory, window, plan = self._meter.sample(), self._engine.window, self._engine.plan
        decode_s = self._last - self._first
        return Usage(
            prompt_tokens=self._prompt_tokens,
            cached_tokens=self._cached,
            completion_tokens=self._tokens,
            ttft_s=self._first - self._began if self._tokens else 0.0,
            prefill_tps=self._computed / self._prefill_s if self._prefill_s else 0.0,
            decode_tps=(self._tokens - 1) / decode_s if decode_s else 0.0,
            rss_bytes=memory.rss_bytes,
            peak_bytes=memory.peak_bytes,
            bytes_streamed=window.bytes_streamed - self._streamed,
            wait_s=window.wait_s - self._waited,
            budget_bytes=plan.budget_bytes,
            predicted_decode_tps=plan.predicted_decode_tps,
            backend=self._backend,
            simulated=plan.simulated,
        )
