"""What is known of a generation while it runs: every chunk carries these statistics."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from edgelm.engine.generate import FinishReason
    from edgelm.engine.logprobs import LogProbs
    from edgelm.engine.running import Running
    from edgelm.engine.speculation.speculator import Counts
    from edgelm.memory.meter import Meter
    from edgelm.text.tools import ToolCall


@dataclass(frozen=True, slots=True)
class Usage:
    """Statistics of one generation up to a chunk.

    `cached_tokens` of the prompt were still in the KV cache. `ttft_s` counts from the call, waiting in the queue
    included; `prefill_tps` and `decode_tps` are tokens a second, 0 until there is something to divide.
    `peak_bytes` is the peak of the process, `bytes_streamed` what this generation read from flash.

    `elapsed_s`, from the beginning of the prompt to this chunk, is split into `compute_s` (programs ran),
    `wait_s` (nothing to compute before a read had ended), `sample_s` and `other_s` (masks, text, the caller).
    Beside them, `read_s` is the time in which at least one read was under way.
    Of the answer's `passes`, which the prompt's are not among, `drafted_tokens` were guessed and verified, and
    `accepted_tokens` of them were right.
    `kv_bytes_spilled` and `kv_bytes_read`: what this generation wrote to flash of keys and values that do not fit in
    memory, and read back.
    `approximate` says what makes the answer an approximation, if anything does; None: it is exact.
    `simulated` names the device whose flash, threads and budget were simulated, if any.
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
    elapsed_s: float
    compute_s: float
    wait_s: float
    sample_s: float
    read_s: float
    budget_bytes: int
    predicted_decode_tps: float
    backend: str
    passes: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    simulated: str | None = None
    kv_bytes_spilled: int = 0
    kv_bytes_read: int = 0
    approximate: str | None = None

    @property
    def tokens_per_pass(self) -> float:
        """What a pass after the prompt yielded on average; 0 before the first."""
        return (self.completion_tokens - 1) / self.passes if self.passes else 0.0

    @property
    def bytes_per_token(self) -> float:
        """Bytes read from flash for each token of the answer, prompt included; 0 before the first."""
        return self.bytes_streamed / self.completion_tokens if self.completion_tokens else 0.0

    @property
    def other_s(self) -> float:
        """What is left of `elapsed_s`."""
        return self.elapsed_s - self.compute_s - self.wait_s - self.sample_s


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of an answer. `token_id` is None in the last chunk, which has the `finish_reason`."""

    text: str
    token_id: int | None
    finish_reason: FinishReason | None
    usage: Usage
    tool_calls: tuple[ToolCall, ...] = ()
    """In the last chunk of a chat with tools: the calls that the model asks for."""
    logprobs: LogProbs | None = None
    """If asked for: the model's log-probability of the token, and of the likeliest alternatives."""
    closed: bool = False
    """In the last chunk of an answer in a form: it was brought to an end, since its limit came near."""


@dataclass(frozen=True, slots=True)
class Score:
    """How likely a model finds a text: the natural logarithm of each token's probability."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]

    @property
    def total(self) -> float:
        return math.fsum(self.logprobs)

    @property
    def perplexity(self) -> float:
        return math.exp(-self.total / len(self.logprobs))


@dataclass(frozen=True, slots=True)
class Sample:
    """One of several answers. `mean_logprob`: of its tokens without the end, by the model's own distribution.

    `closed`: see `Chunk`.
    """

    text: str
    token_ids: tuple[int, ...]
    mean_logprob: float
    finish_reason: FinishReason
    seed: int | None
    closed: bool = False


SAMPLE_S = 0.02
"""How old the memory counters of a chunk may be: to read them takes the system longer than to sample a token."""


class Clock:
    """Takes the times of one generation."""

    def __init__(self, engine: Running, counts: Counts, meter: Meter, backend: str, prompt_tokens: int) -> None:
        self._engine, self._meter, self._backend = engine, meter, backend
        self._prompt_tokens, self._cached, self._computed, self._tokens = prompt_tokens, 0, 0, 0
        self._counts, self._counted = counts, replace(counts)
        self._began = time.perf_counter()
        self._prefill_began = self._began
        self._prefill_s = self._first = self._last = 0.0
        self._streamed, self._before_s = engine.bytes_streamed, engine.times.sums_s()
        self._kv = engine.kv_traffic
        self._memory, self._sampled = meter.sample(), self._began
        self._plan, self._predicted_tps = engine.plan, engine.plan.predicted_decode_tps

    def started(self) -> None:
        """The queue is over: prefill begins."""
        self._counted = replace(self._counts)
        self._prefill_began = time.perf_counter()
        self._streamed, self._before_s = self._engine.bytes_streamed, self._engine.times.sums_s()
        self._kv = self._engine.kv_traffic

    def prefilled(self, computed: int) -> None:
        """The prompt is in the cache; `computed` of its tokens had to be computed."""
        self._cached, self._computed = self._prompt_tokens - computed, computed
        self._prefill_s = time.perf_counter() - self._prefill_began

    def token(self) -> None:
        """A token was sampled."""
        self._last = time.perf_counter()
        self._first = self._first or self._last
        self._tokens += 1
        self._engine.times.add("token", self._tokens, self._last)

    def usage(self, final: bool = False) -> Usage:
        """Return the statistics of this moment; all are fresh if it is the `final` one."""
        plan, now = self._engine.plan, time.perf_counter()
        if final or now - self._sampled > SAMPLE_S:
            self._memory, self._sampled = self._meter.sample(), now
        if plan is not self._plan:
            self._plan, self._predicted_tps = plan, plan.predicted_decode_tps
        memory, kv = self._memory, self._engine.kv_traffic
        decode_s = self._last - self._first
        sums_s = self._engine.times.sums_s()
        counts, before = self._counts, self._counted
        return Usage(
            prompt_tokens=self._prompt_tokens,
            cached_tokens=self._cached,
            completion_tokens=self._tokens,
            ttft_s=self._first - self._began if self._tokens else 0.0,
            prefill_tps=self._computed / self._prefill_s if self._prefill_s else 0.0,
            decode_tps=(self._tokens - 1) / decode_s if decode_s else 0.0,
            rss_bytes=memory.rss_bytes,
            peak_bytes=memory.peak_bytes,
            bytes_streamed=self._engine.bytes_streamed - self._streamed,
            elapsed_s=time.perf_counter() - self._prefill_began,  # taken after the sums: it holds them
            compute_s=sums_s["compute"] - self._before_s["compute"],
            wait_s=sums_s["wait"] - self._before_s["wait"],
            sample_s=sums_s["sample"] - self._before_s["sample"],
            read_s=sums_s["read"] - self._before_s["read"],
            budget_bytes=plan.budget_bytes,
            predicted_decode_tps=self._predicted_tps,
            backend=self._backend,
            passes=counts.passes - before.passes,
            drafted_tokens=counts.drafted - before.drafted,
            accepted_tokens=counts.accepted - before.accepted,
            simulated=plan.simulated,
            kv_bytes_spilled=kv.written_bytes - self._kv.written_bytes,
            kv_bytes_read=kv.read_bytes - self._kv.read_bytes,
            approximate=plan.approximate,
        )
