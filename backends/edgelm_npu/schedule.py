"""Order tasks on a processor and an NPU that work side by side, and say how long they take. Pure: times in, times out.

A prompt cut into chunks leaves each processor idle while the other computes a chunk, unless tasks of several chunks
may overtake each other: llm.npu's out-of-order execution of subgraphs (arXiv:2407.05858). Its greedy rule prefers what
keeps the NPU busy; here a free processor takes the ready task with the longest way to the end, times and waits
counted (the upward rank of HEFT, Topcuoglu et al. 2002), which does the same where the NPU's work is on that way.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple


class Task(NamedTuple):
    """`seconds` of work for one processor, after the tasks `after` (indices of earlier tasks)."""

    processor: str
    seconds: float
    after: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Schedule:
    """When each task starts, the order of the starts, and when the last one ends."""

    starts_s: tuple[float, ...]
    order: tuple[int, ...]
    seconds: float


def in_order(tasks: Sequence[Task], sync_s: float) -> Schedule:
    """Every processor takes its tasks in the order given. A result of the other one arrives `sync_s` later."""
    free: dict[str, float] = {}
    starts: list[float] = []
    for task in tasks:
        start = max(free.get(task.processor, 0.0), _ready_s(task, tasks, starts, sync_s))
        starts.append(start)
        free[task.processor] = start + task.seconds
    return _made(tasks, starts)


def out_of_order(tasks: Sequence[Task], sync_s: float) -> Schedule:
    """Tasks overtake each other where what they wait for allows it. Never longer than `in_order`."""
    ranks, following = _ranks(tasks, sync_s)
    missing = [len(task.after) for task in tasks]
    starts = [0.0] * len(tasks)
    waiting: dict[str, list[tuple[float, int]]] = {task.processor: [] for task in tasks}  # by the time they are ready
    ready: dict[str, list[tuple[float, int]]] = {processor: [] for processor in waiting}  # by rank, the longest first
    free = dict.fromkeys(waiting, 0.0)
    for i, task in enumerate(tasks):
        if not task.after:
            heapq.heappush(waiting[task.processor], (0.0, i))
    for _ in tasks:
        # the processor that can start something first does; only then is known what becomes ready
        now, processor = min((_next_s(name, free, waiting, ready), name) for name in waiting)
        while waiting[processor] and waiting[processor][0][0] <= now:
            _, i = heapq.heappop(waiting[processor])
            heapq.heappush(ready[processor], (-ranks[i], i))
        _, chosen = heapq.heappop(ready[processor])
        starts[chosen] = now
        free[processor] = now + tasks[chosen].seconds
        for i in following[chosen]:
            missing[i] -= 1
            if not missing[i]:
                heapq.heappush(waiting[tasks[i].processor], (_ready_s(tasks[i], tasks, starts, sync_s), i))
    made = _made(tasks, starts)
    plain = in_order(tasks, sync_s)  # a greedy rule can lose by looking no further (Graham's anomalies)
    return made if made.seconds < plain.seconds else plain


def _next_s(
    name: str,
    free: dict[str, float],
    waiting: dict[str, list[tuple[float, int]]],
    ready: dict[str, list[tuple[float, int]]],
) -> float:
    if ready[name]:
        return free[name]
    return max(free[name], waiting[name][0][0]) if waiting[name] else float("inf")


def _ready_s(task: Task, tasks: Sequence[Task], starts: Sequence[float], sync_s: float) -> float:
    ends = (
        starts[i] + tasks[i].seconds + (sync_s if tasks[i].processor != task.processor else 0.0) for i in task.after
    )
    return max(ends, default=0.0)


def _ranks(tasks: Sequence[Task], sync_s: float) -> tuple[list[float], list[list[int]]]:
    """Return the longest way from the start of each task to the end, and which tasks wait for it."""
    following: list[list[int]] = [[] for _ in tasks]
    for i, task in enumerate(tasks):
        for before in task.after:
            following[before].append(i)
    ranks = [0.0] * len(tasks)
    for i in range(len(tasks) - 1, -1, -1):
        task = tasks[i]
        ways = (ranks[j] + (sync_s if tasks[j].processor != task.processor else 0.0) for j in following[i])
        ranks[i] = task.seconds + max(ways, default=0.0)
    return ranks, following


def _made(tasks: Sequence[Task], starts: Sequence[float]) -> Schedule:
    # a task of no seconds may start when the one it waits for does: the order given breaks the tie
    order = sorted(range(len(tasks)), key=lambda i: (starts[i], i))
    seconds = max((start + task.seconds for start, task in zip(starts, tasks, strict=True)), default=0.0)
    return Schedule(tuple(starts), tuple(order), seconds)
