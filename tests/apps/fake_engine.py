"""A simulated engine behind the public names of `edgelm`: it echoes words, and computes nothing."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import edgelm
from edgelm.engine.choosing import Candidate
from edgelm.errors import BudgetTooSmall, ContextOverflow
from edgelm.sizes import MB, parse_size


@dataclass(frozen=True)
class FakeUsage:
    prompt_tokens: int = 5
    completion_tokens: int = 0
    ttft_s: float = 0.25
    prefill_tps: float = 20.0
    decode_tps: float = 10.0
    rss_bytes: int = 80 * MB
    peak_bytes: int = 90 * MB
    bytes_streamed: int = 70 * MB
    kv_bytes_spilled: int = 0
    kv_bytes_read: int = 0
    passes: int = 2
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    tokens_per_pass: float = 1.0
    bytes_per_token: float = 35.0 * MB
    elapsed_s: float = 2.0
    compute_s: float = 0.6
    wait_s: float = 1.2
    sample_s: float = 0.04
    other_s: float = 0.16
    read_s: float = 0.1
    predicted_decode_tps: float = 11.0
    budget_bytes: int = 100 * MB
    backend: str = "simulated"
    simulated: str | None = None
    approximate: str | None = None


@dataclass(frozen=True)
class FakeChunk:
    text: str
    token_id: int | None
    finish_reason: str | None
    usage: FakeUsage
    logprobs: None = None
    closed: bool = False


@dataclass(frozen=True)
class FakePlan:
    budget_bytes: int
    context: int
    simulated: str | None = None

    def as_dict(self) -> dict[str, Any]:
        return {"budget_bytes": self.budget_bytes, "context": self.context}

    def __str__(self) -> str:
        return f"plan for {self.budget_bytes} bytes"


@dataclass
class FakeModel:
    path: Path
    options: dict[str, Any]
    asked: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    closed: bool = False
    overflow: str | None = None
    cancelled: bool = False
    backend: str = "simulated"
    notes: tuple[str, ...] = ("the simulated plan gave in once",)
    template: SimpleNamespace = field(default_factory=lambda: SimpleNamespace(notice="a simulated template"))

    def __post_init__(self) -> None:
        budget_bytes = parse_size(self.options.get("memory", 100 * MB))
        if budget_bytes < 10 * MB:
            raise BudgetTooSmall(budget_bytes, 10 * MB, [("everything", 10 * MB)])
        self.plan = FakePlan(budget_bytes, self.options.get("context", 64), self.options.get("simulate"))

    def __enter__(self) -> FakeModel:
        return self

    def __exit__(self, *error: object) -> None:
        self.closed = True

    def cancel(self) -> None:
        self.cancelled = True

    def stream(self, prompt: str, **options: Any) -> Iterator[FakeChunk]:
        self.asked.append((prompt, options))
        if "noise" in prompt:
            os.write(2, b"a library complains\n")
        if "defect" in prompt:
            raise RuntimeError("this should not have happened")
        if "overflow" in prompt:
            raise ContextOverflow(999, self.plan.context)
        self.cancelled = False
        if announce := self.options.get("adaptive"):
            announce("memory is short: budget 100 MB -> 80 MB")
        words = f"echo: {prompt}".split(" ")
        for number, word in enumerate(words):
            time.sleep(float(os.environ.get("FAKE_DELAY_S", "0")))
            usage = FakeUsage(
                completion_tokens=number + 1, budget_bytes=self.plan.budget_bytes, simulated=self.plan.simulated
            )
            reason = "cancelled" if self.cancelled else "stop" if number == len(words) - 1 else None
            yield FakeChunk(word if number == 0 else f" {word}", 100 + number, reason, usage)
            if reason:
                return

    def samples(self, prompt: str, n: int, **options: Any) -> list[edgelm.Sample]:
        self.asked.append((prompt, options))
        reason = "cancelled" if self.cancelled else "stop"
        return [edgelm.Sample(f"{prompt}, {i}", (100, i), -float(i), reason, None) for i in range(1, n + 1)]

    def chat(self, system: str | None = None, *, overflow: str = "error", keep: bool = False) -> FakeChat:
        return FakeChat(self, system, overflow)


@dataclass
class FakeChat:
    model: FakeModel
    system: str | None
    overflow: str
    turns: int = 0
    messages: list[dict[str, str]] = field(default_factory=list)

    def clear(self) -> None:
        self.turns = 0
        self.messages.clear()

    def render(self, text: str) -> str:
        return f"<{self.system}|{text}>"

    def stream(self, text: str, **options: Any) -> Iterator[FakeChunk]:
        self.turns += 1
        self.model.overflow = self.overflow
        said = ""
        for chunk in self.model.stream(f"{self.system or 'none'}#{self.turns} {text}", **options):
            said += chunk.text
            yield chunk
        self.messages += [{"role": "user", "content": text}, {"role": "assistant", "content": said}]

    def samples(self, text: str, n: int, **options: Any) -> list[edgelm.Sample]:
        self.model.overflow = self.overflow
        return self.model.samples(f"{self.system or 'none'} {text}", n, **options)


LOADED: list[FakeModel] = []


def load(
    path: Path, *, progress: Callable[[int, int], None], notice: Callable[[str], None], **options: Any
) -> FakeModel:
    progress(1, 1)
    LOADED.append(FakeModel(Path(path), options))
    return LOADED[-1]


def inspect(path: Path) -> SimpleNamespace:
    tensors = [
        SimpleNamespace(name="token_embd.weight", type="Q4_1", shape=(8, 32), size_bytes=160),
        SimpleNamespace(name="output_norm.weight", type="F32", shape=(32,), size_bytes=128),
    ]
    metadata = {"general.name": "Fake", "tokenizer.ggml.tokens": [f"t{i}" for i in range(100)]}
    return SimpleNamespace(architecture="llama", metadata=metadata, tensors=tensors, template="{{ messages }}")


@dataclass(frozen=True)
class FakeReport:
    name: str
    version: str | None
    available: bool
    reason: str | None
    capabilities: dict[str, Any]


def backends(*, recheck: bool = False) -> list[FakeReport]:
    return [
        FakeReport("numpy", "2.0", True, None, {"streams": True, "tensor_types": ["F32", "Q4_0"]}),
        FakeReport("llamacpp", None, False, "not installed", {}),
    ]


def candidates(path: Path, *, memory: str = "100MB", recheck: bool = False) -> tuple[Candidate, ...]:
    budget = parse_size(memory)
    return (
        Candidate("fast", "1.0", True, "chosen, the fastest", 40.0, budget, 3 * MB, prepare_bytes=95 * MB),
        Candidate("npu", "1.0", False, "passed over, slower", 20.0, 60 * MB, loss="rounded", simulated=True),
        Candidate("numpy", "2.0", False, "passed over, the budget is too small for it", needed_bytes=2 * budget),
    )


def doctor(*, recheck: bool = False) -> dict[str, Any]:
    table = [
        {"how": how, "block_bytes": block << 10, "n_parallel": n, "bytes_per_s": n * block * 1e6, "cpu_s_per_gb": 0.25}
        for how, block, n in (("direct", 512, 1), ("direct", 512, 2), ("direct", 1024, 2), ("buffered", 512, 2))
    ]
    flash = {"read_bytes_per_s": 1.5e9, "direct": True, "table": table}
    return {"cores": 2, "available_bytes": 4 * 10**9, "flash": flash}


def replacements() -> dict[str, Any]:
    """Return the public names that this module stands in for."""
    return {
        "load": load,
        "plan": lambda path, **options: FakeModel(path, options).plan,
        "inspect": inspect,
        "backends": backends,
        "candidates": candidates,
        "doctor": doctor,
        "__version__": "0.0.0+simulated",
    }


def install() -> None:
    """Replace the public names for the rest of this process (for commands run in a child)."""
    for name, value in replacements().items():
        setattr(edgelm, name, value)
