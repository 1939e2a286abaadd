"""What `/metrics` shows, in the format of Prometheus."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest

if TYPE_CHECKING:
    from edgelm import Usage
    from edgelm_apps.server.pool import Pool
    from edgelm_apps.server.queue import Queue

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """The counters of one server."""

    def __init__(self, pool: Pool, queue: Queue) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self._registry = registry = CollectorRegistry()
        self.requests = Counter(
            "edgelm_requests", "Requests, by route and status.", ("route", "status"), registry=registry
        )
        self.refused = Counter("edgelm_queue_full", "Requests that found no place in the queue.", registry=registry)
        self.cancelled = Counter("edgelm_cancelled", "Answers whose reader left.", registry=registry)
        self._prompt = Counter("edgelm_prompt_tokens", "Tokens of prompts.", registry=registry)
        self._cached = Counter(
            "edgelm_cached_tokens", "Tokens of prompts that were still in the cache.", registry=registry
        )
        self._written = Counter("edgelm_completion_tokens", "Tokens of answers.", registry=registry)
        self._streamed = Counter("edgelm_streamed_bytes", "Bytes of weights read from flash.", registry=registry)
        self._first = Histogram(
            "edgelm_first_token_seconds", "From the turn of a request to its first token.", buckets=_SECONDS,
            registry=registry,
        )  # fmt: skip
        self._tps = Gauge("edgelm_decode_tokens_per_second", "Of the newest answer.", registry=registry)
        self._rss = Gauge("edgelm_resident_bytes", "Memory of the process, at the newest answer.", registry=registry)
        self._peak = Gauge("edgelm_peak_bytes", "The most that it ever was.", registry=registry)
        budget = Gauge("edgelm_budget_bytes", "The budget of the process.", registry=registry)
        budget.set_function(lambda: pool.loaded.plan.budget_bytes if pool.loaded else 0)
        Gauge("edgelm_waiting_requests", "Requests in the queue.", registry=registry).set_function(lambda: len(queue))
        swaps = Gauge("edgelm_model_loads", "How often a model was loaded.", registry=registry)
        swaps.set_function(lambda: pool.swaps)

    def answered(self, usage: Usage) -> None:
        """Count an answer that has ended."""
        self._prompt.inc(usage.prompt_tokens)
        self._cached.inc(usage.cached_tokens)
        self._written.inc(usage.completion_tokens)
        self._streamed.inc(usage.bytes_streamed)
        self._first.observe(usage.ttft_s)
        self._tps.set(usage.decode_tps)
        self._rss.set(usage.rss_bytes)
        self._peak.set(usage.peak_bytes)

    def text(self) -> bytes:
        return generate_latest(self._registry)
