"""The queue is fair, bounded, and forgets whoever leaves."""

from __future__ import annotations

import asyncio

import pytest

from edgelm_apps.server.queue import Full, Place, Queue


async def hold(place: Place, order: list[str], name: str, until: asyncio.Event | None = None) -> None:
    async with place.turn():
        order.append(name)
        if until is not None:
            await until.wait()


def test_clients_take_turns_however_often_one_asks() -> None:
    async def main() -> list[str]:
        queue, order, done = Queue(8), [], asyncio.Event()
        names = ["a1", "a2", "a3", "b1", "c1", "b2"]
        tasks = [
            asyncio.create_task(hold(queue.enter(name[0]), order, name, done if name == "a1" else None))
            for name in names
        ]
        await asyncio.sleep(0)
        assert len(queue) == 5
        done.set()
        await asyncio.gather(*tasks)
        assert not queue.busy
        return order

    assert asyncio.run(main()) == ["a1", "a2", "b1", "c1", "a3", "b2"]


def test_one_too_many_is_told_when_to_come_back() -> None:
    async def main() -> None:
        queue = Queue(1)
        first, second = queue.enter("a"), queue.enter("b")
        with pytest.raises(Full) as caught:
            queue.enter("c")
        assert caught.value.retry_s >= 1
        second.leave()
        queue.enter("c")
        first.leave()
        assert queue.busy
        assert len(queue) == 0

    asyncio.run(main())


def test_without_places_there_is_still_the_engine() -> None:
    async def main() -> None:
        queue = Queue(0)
        place = queue.enter("a")
        with pytest.raises(Full):
            queue.enter("a")
        place.leave()
        queue.enter("a").leave()
        assert not queue.busy

    asyncio.run(main())


def test_whoever_is_cancelled_while_waiting_or_computing_leaves() -> None:
    async def main() -> None:
        queue, order, never = Queue(4), [], asyncio.Event()
        first = asyncio.create_task(hold(queue.enter("a"), order, "first", never))
        second = asyncio.create_task(hold(queue.enter("b"), order, "second"))
        third = asyncio.create_task(hold(queue.enter("c"), order, "third"))
        await asyncio.sleep(0)
        for task in (second, first):
            task.cancel()
        await asyncio.gather(first, second, third, return_exceptions=True)
        assert order == ["first", "third"]
        assert not queue.busy
        assert len(queue) == 0

    asyncio.run(main())
