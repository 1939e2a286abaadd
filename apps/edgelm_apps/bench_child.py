"""One side of `edgelm bench` in a process of its own: loads a model once, then measures what it is asked for.

One JSON object as argument. Answers are lines of JSON on stdout: first what was loaded, or why not; then one for each
line of stdin. Imports no command line: what this process takes counts against the budget that is measured.
"""

from __future__ import annotations

import json
import random
import sys
import time
from pathlib import Path
from typing import Any, Protocol


class Side(Protocol):
    """An engine with a loaded model. Prompts are random ids, as llama-bench has them."""

    n_vocab: int

    def facts(self) -> dict[str, Any]:
        """Return what the engine decided: backend, threads, budget."""
        ...

    def fill(self, ids: list[int]) -> None:
        """Leave exactly `ids` in the cache."""
        ...

    def prompt(self, before: list[int], ids: list[int]) -> dict[str, Any]:
        """Compute `ids` after `before`, which is in the cache; return `seconds` and, if known, `read_bytes`."""
        ...

    def generate(self, before: list[int], first: int, n: int) -> dict[str, Any]:
        """Compute `n` passes of one token, the first of them `first`; return the same."""
        ...

    def peak_bytes(self) -> int:
        """Return the largest size that the process has had."""
        ...


class Ours:
    """edgelm, through its public names."""

    def __init__(self, spec: dict[str, Any]) -> None:
        import edgelm

        keys = ("memory", "backend", "threads", "context", "kv", "simulate")
        given = {key: spec[key] for key in keys if spec.get(key) is not None}
        self._model = edgelm.load(spec["model"], **given, speculate=False)  # a token a pass, as llama-bench counts
        self.n_vocab = self._model.tokenizer.n_vocab
        self._peak_bytes = 0

    def facts(self) -> dict[str, Any]:
        model, plan = self._model, self._model.plan
        return {
            "backend": model.backend,
            "threads": model.threads,
            "kv": plan.demand.kv,
            "budget_bytes": plan.budget_bytes,
            "simulated": plan.simulated,
        }

    def fill(self, ids: list[int]) -> None:
        for _ in self._model.stream_ids(ids, max_tokens=1, ignore_eos=True):
            pass

    def prompt(self, before: list[int], ids: list[int]) -> dict[str, Any]:
        chunks = list(self._model.stream_ids([*before, *ids], max_tokens=1, ignore_eos=True))
        usage = chunks[-1].usage
        self._peak_bytes = usage.peak_bytes
        computed = usage.prompt_tokens - usage.cached_tokens
        if computed != len(ids):
            raise RuntimeError(f"{computed} tokens were computed where {len(ids)} were to be measured")
        return {"seconds": computed / usage.prefill_tps, "read_bytes": usage.bytes_streamed}

    def generate(self, before: list[int], first: int, n: int) -> dict[str, Any]:
        done, last, began = 0, 0.0, time.perf_counter()
        for chunk in self._model.stream_ids([*before, first], max_tokens=n, ignore_eos=True):
            if chunk.token_id is not None:
                done, last = done + 1, time.perf_counter()
        if done != n:
            raise RuntimeError(f"{done} tokens were generated where {n} were to be measured")
        self._peak_bytes = chunk.usage.peak_bytes
        return {"seconds": last - began, "read_bytes": chunk.usage.bytes_streamed}

    def peak_bytes(self) -> int:
        return self._peak_bytes


class Theirs:
    """llama.cpp. Takes the likeliest token as edgelm does; reads are what the kernel charges to the process."""

    def __init__(self, spec: dict[str, Any]) -> None:
        from edgelm_apps.peer import Peer, use_plain_buffers

        if spec["plain"]:
            use_plain_buffers()
        self._threads = spec["threads"]
        self._peer = Peer(spec["model"], threads=self._threads, context=spec["context"], batch=spec["batch"])
        self.n_vocab = self._peer.n_vocab

    def facts(self) -> dict[str, Any]:
        return {"threads": self._threads}

    def fill(self, ids: list[int]) -> None:
        self._peer.clear()
        self._peer.decode(ids)

    def prompt(self, before: list[int], ids: list[int]) -> dict[str, Any]:
        if not before:
            self._peer.clear()
        read, began = _read_bytes(), time.perf_counter()
        self._peer.decode(ids)
        return _since(read, began)

    def generate(self, before: list[int], first: int, n: int) -> dict[str, Any]:
        if not before:
            self._peer.clear()
        read, began, token = _read_bytes(), time.perf_counter(), first
        for _ in range(n):
            token = int(self._peer.decode([token]).argmax())
        return _since(read, began)

    def peak_bytes(self) -> int:
        if sys.platform == "win32":
            import psutil

            return int(psutil.Process().memory_info().peak_wset)
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _read_bytes() -> int | None:
    """Return the bytes that this process had fetched from a disk, page faults included, where the kernel tells."""
    try:
        lines = Path("/proc/self/io").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) for line in lines if line.startswith("read_bytes:")), None)


def _since(read: int | None, began: float) -> dict[str, Any]:
    seconds, now = time.perf_counter() - began, _read_bytes()
    return {"seconds": seconds, "read_bytes": None if read is None or now is None else now - read}


def measure(side: Side, test: dict[str, Any], turn: int) -> dict[str, Any]:
    """Run a test once. `turn` is another one each time: no two prompts begin alike, so that none is in the cache."""
    last = side.n_vocab - 1
    depth, n = test["depth"], test["n"]
    before = [last, *random.Random("depth").choices(range(last), k=depth - 1)] if depth else []
    if before:
        side.fill(before)
    first = turn % last
    if test["kind"] == "tg":
        found = side.generate(before, first, n)
    else:
        found = side.prompt(before, [first, *random.Random(turn).choices(range(last), k=n - 1)])
    return found | {"peak_bytes": side.peak_bytes()}


def main(spec: dict[str, Any]) -> None:
    """Load, say so, and answer until stdin ends."""
    from edgelm.errors import EdgeLMError

    try:
        side: Side = Ours(spec) if spec["side"] == "edgelm" else Theirs(spec)
    except EdgeLMError as error:
        needed = getattr(error, "needed_bytes", None)
        _say({"error": str(error), "exit_code": error.exit_code, "needed_bytes": needed})
        return
    _say(side.facts())
    for turn, line in enumerate(sys.stdin, start=1):
        _say(measure(side, json.loads(line), turn))


def _say(answer: dict[str, Any]) -> None:
    print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
