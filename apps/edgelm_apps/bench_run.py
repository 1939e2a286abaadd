"""The order of measuring of `edgelm bench`: sides are loaded together and take turns, one repetition at a time.

Knows combinations and tests; processes are `bench_sides`, the result is rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any

from edgelm_apps.bench_rows import BenchTest, Row
from edgelm_apps.bench_sides import Ended, Process

PEERS: Mapping[str, dict[str, Any]] = {"llama.cpp": {"plain": False}, "llama.cpp-plain": {"plain": True}}
BATCH = 512
MIN_CONTEXT = 64


@dataclass(frozen=True, slots=True)
class Combination:
    """What is measured in one process of edgelm, and in one of each peer beside it."""

    path: Path
    memory: str
    backend: str
    threads: int | None
    kv: str
    simulate: str | None
    peers: tuple[str, ...]


@dataclass(slots=True)
class _Side:
    engine: str
    process: Process | None = None
    ended: Ended | None = None
    answers: list[dict[str, Any]] = field(default_factory=list)


def rows_of(
    combination: Combination, tests: Sequence[BenchTest], repetitions: int, tick: Callable[[], object]
) -> Iterator[Row]:
    """Measure every test on every side and yield rows as they are ready; `tick` hears of every turn.

    A side that refuses or dies gets rows that say so. Raises `ConfigError` for a mistake of the caller's.
    """
    size = max(test.depth + test.n for test in tests)
    longest = max((test.n for test in tests if test.kind == "pp"), default=1)
    with ExitStack() as stack:
        sides = _load(stack, combination, max(size + 1, MIN_CONTEXT), max(min(longest, BATCH), 1))
        about = _about(combination)
        for side in sides:
            if side.ended is not None:
                yield _row(about, side, None, bool(combination.peers))
        working = [side for side in sides if side.process is not None]
        for test in tests:
            _take_turns(working, test, repetitions, tick)
            yield from (_row(about, side, test, bool(combination.peers)) for side in working)


def _load(stack: ExitStack, combination: Combination, context: int, batch: int) -> list[_Side]:
    from edgelm.errors import ConfigError
    from edgelm.sizes import parse_size

    memory = None if combination.memory == "auto" else combination.memory
    limit_bytes = parse_size(memory) if memory and combination.peers else None
    spec: dict[str, Any] = {"model": str(combination.path), "threads": combination.threads, "context": context}
    ours = {"memory": memory, "backend": combination.backend, "kv": combination.kv, "simulate": combination.simulate}
    sides = [_start(stack, "edgelm", spec | ours, limit_bytes)]
    if limit_bytes and sides[0].ended is not None:  # killed before it could say what it needs: outside it can
        free = _start(stack, "edgelm", spec | ours, None)
        sides = [free] if free.ended is not None else sides
    if sides[0].ended is not None and sides[0].ended.exit_code == ConfigError.exit_code:
        raise ConfigError(str(sides[0].ended))
    threads = sides[0].process.facts["threads"] if sides[0].process else combination.threads or _cores()
    for peer in combination.peers:
        theirs = {"threads": threads, "batch": batch, **PEERS[peer]}
        sides.append(_start(stack, peer, spec | theirs, limit_bytes))
    return sides


def _start(stack: ExitStack, engine: str, spec: dict[str, Any], limit_bytes: int | None) -> _Side:
    try:
        return _Side(engine, stack.enter_context(Process({"side": engine, **spec}, limit_bytes)))
    except Ended as ended:
        return _Side(engine, ended=ended)


def _cores() -> int:
    import psutil

    return psutil.cpu_count(logical=False) or 1


def _take_turns(sides: Sequence[_Side], test: BenchTest, repetitions: int, tick: Callable[[], object]) -> None:
    for side in sides:
        side.answers = []
    # as llama-bench warms up: a whole prompt, or a single token
    warm_up = replace(test, n=1) if test.kind == "tg" else test
    for turn in range(repetitions + 1):
        for side in sides:
            if side.ended is None and side.process is not None:
                try:
                    answer = side.process.measure(asdict(test if turn else warm_up))
                except Ended as ended:
                    side.ended, side.answers = ended, []
                else:
                    side.answers += [answer] if turn else []
            tick()


def _about(combination: Combination) -> Row:
    """Return what all rows of a combination have in common."""
    import edgelm
    from edgelm.sizes import parse_size

    tensors = edgelm.inspect(combination.path).tensors
    return Row(
        model=combination.path.stem,
        size_bytes=sum(tensor.size_bytes for tensor in tensors),
        params=sum(prod(tensor.shape) for tensor in tensors),
        engine="edgelm",
        backend=combination.backend,
        threads=combination.threads,
        kv=combination.kv,
        memory=combination.memory,
        budget_bytes=None if combination.memory == "auto" else parse_size(combination.memory),
        limit=None,
        simulated=combination.simulate,
        test=None,
    )


def _row(about: Row, side: _Side, test: BenchTest | None, compared: bool) -> Row:
    facts = side.process.facts if side.process else {}
    last = side.answers[-1] if side.answers else {}
    read = [answer["read_bytes"] for answer in side.answers if answer["read_bytes"] is not None]
    ours = side.engine == "edgelm"
    return replace(
        about,
        engine=side.engine,
        backend=facts.get("backend", about.backend) if ours else None,
        threads=facts.get("threads", about.threads),
        kv=facts.get("kv", about.kv) if ours else None,
        budget_bytes=facts.get("budget_bytes", about.budget_bytes),
        simulated=facts.get("simulated", about.simulated),
        limit=side.process.limit if side.process and compared else None,
        test=str(test) if test else None,
        samples=tuple(test.n / answer["seconds"] for answer in side.answers) if test else (),
        peak_bytes=last.get("peak_bytes"),
        read_bytes_per_token=sum(read) / len(read) / test.n if test and read else None,
        failed=str(side.ended) if side.ended else None,
        needed_bytes=side.ended.needed_bytes if side.ended else None,
        exit_code=side.ended.exit_code if side.ended else 0,
    )
