"""The NPU's scheduler: nothing begins before what it waits for, nothing overlaps, and overtaking never costs time."""

from __future__ import annotations

from itertools import pairwise, permutations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgelm_npu.schedule import Schedule, Task, in_order, out_of_order

SECONDS = st.integers(0, 20).map(float)


@st.composite
def task_lists(draw: st.DrawFn, most: int = 24) -> list[Task]:
    tasks: list[Task] = []
    for i in range(draw(st.integers(1, most))):
        after = draw(st.sets(st.integers(0, i - 1), max_size=3)) if i else set()
        tasks.append(Task(draw(st.sampled_from(["cpu", "npu"])), draw(SECONDS), tuple(sorted(after))))
    return tasks


def violations(tasks: list[Task], made: Schedule, sync_s: float) -> list[str]:
    """Return everything that a device could not do."""
    found = []
    ends = [start + task.seconds for start, task in zip(made.starts_s, tasks, strict=True)]
    for i, task in enumerate(tasks):
        for before in task.after:
            wait = sync_s if tasks[before].processor != task.processor else 0.0
            if made.starts_s[i] < ends[before] + wait:
                found.append(f"{i} begins before {before} has arrived")
    for processor in ("cpu", "npu"):
        # of two that begin together only one may take time, and it comes last
        mine = sorted((made.starts_s[i], ends[i]) for i, task in enumerate(tasks) if task.processor == processor)
        found += [f"{b} overlaps {a} on {processor}" for a, b in pairwise(mine) if b[0] < a[1]]
    place = {i: at for at, i in enumerate(made.order)}
    found += [f"{i} is computed before {j}" for i, task in enumerate(tasks) for j in task.after if place[i] < place[j]]
    if sorted(made.order) != list(range(len(tasks))):
        found.append("a task is missing or done twice")
    if made.seconds != max(ends):
        found.append("the end is not the last end")
    return found


def longest_way(tasks: list[Task], sync_s: float) -> float:
    ends: list[float] = []
    for task in tasks:
        waits = (ends[i] + (sync_s if tasks[i].processor != task.processor else 0.0) for i in task.after)
        ends.append(max(waits, default=0.0) + task.seconds)
    return max(ends)


@given(tasks=task_lists(), sync=SECONDS)
def test_dependencies_hold_and_nothing_overlaps(tasks: list[Task], sync: float) -> None:
    for schedule in (in_order, out_of_order):
        assert violations(tasks, schedule(tasks, sync), sync) == []


@given(tasks=task_lists(), sync=SECONDS)
def test_the_end_lies_between_what_is_possible_and_the_order_given(tasks: list[Task], sync: float) -> None:
    made = out_of_order(tasks, sync)
    busiest = max(sum(task.seconds for task in tasks if task.processor == name) for name in ("cpu", "npu"))
    assert max(busiest, longest_way(tasks, sync)) <= made.seconds <= in_order(tasks, sync).seconds


@given(tasks=task_lists(most=5))
def test_few_tasks_take_at_most_twice_the_best_possible(tasks: list[Task]) -> None:
    """Graham's bound for a processor that never waits while it has work; with two of them, and no syncs: 2."""
    best = min(
        _in_this_order(tasks, order).seconds for order in permutations(range(len(tasks))) if _possible(tasks, order)
    )
    assert best <= out_of_order(tasks, 0.0).seconds <= 2 * best


def _possible(tasks: list[Task], order: tuple[int, ...]) -> bool:
    place = {i: at for at, i in enumerate(order)}
    return all(place[j] < place[i] for i, task in enumerate(tasks) for j in task.after)


def _in_this_order(tasks: list[Task], order: tuple[int, ...]) -> Schedule:
    place = {i: at for at, i in enumerate(order)}
    return in_order([tasks[i]._replace(after=tuple(place[j] for j in tasks[i].after)) for i in order], 0.0)


def chunks(n_chunks: int, n_blocks: int, cpu_s: float, npu_s: float) -> list[Task]:
    """A prompt: each block attends on the processor, in turn over chunks, and multiplies on the NPU."""
    tasks: list[Task] = []
    attends: dict[int, int] = {}
    for _ in range(n_chunks):
        last: tuple[int, ...] = ()
        for block in range(n_blocks):
            waits = (*last, attends[block]) if block in attends else last
            attends[block] = len(tasks)
            tasks.append(Task("cpu", cpu_s, waits))
            tasks.append(Task("npu", npu_s, (len(tasks) - 1,)))
            last = (len(tasks) - 1,)
    return tasks


def test_chunks_that_overtake_keep_both_processors_busy() -> None:
    """In order, a processor waits for the other at every block: 2 s a block. Overtaking hides one behind the other."""
    tasks = chunks(n_chunks=4, n_blocks=6, cpu_s=1.0, npu_s=1.0)
    assert in_order(tasks, 0.0).seconds == pytest.approx(4 * 6 * 2 - 3)
    assert out_of_order(tasks, 0.0).seconds <= 4 * 6 + 6


def test_one_chunk_has_nothing_to_overtake() -> None:
    tasks = chunks(n_chunks=1, n_blocks=6, cpu_s=1.0, npu_s=2.0)
    assert out_of_order(tasks, 0.5).seconds == in_order(tasks, 0.5).seconds == 6 * 3 + 11 * 0.5
