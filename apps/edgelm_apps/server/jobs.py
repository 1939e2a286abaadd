"""An answer on its way: it waits in the queue, gets its model, and computes in a thread while others are served."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import aclosing
from typing import TYPE_CHECKING, TypeVar

from edgelm.aio import iterate
from edgelm_apps.server.errors import Stopping

if TYPE_CHECKING:
    from edgelm import Model
    from edgelm_apps.server.pool import Pool, Served
    from edgelm_apps.server.queue import Place

Item = TypeVar("Item")
_running: set[asyncio.Task[None]] = set()
"""The event loop itself does not keep its tasks."""


async def stream(
    place: Place, pool: Pool, served: Served, make: Callable[[Model], Generator[Item, None, None]]
) -> AsyncGenerator[Item, None]:
    """Yield what `make(model)` yields, once it is the turn of `place`. Whoever stops listening stops the engine.

    The work is a task of its own: a listener may be cancelled again and again while it leaves, and the engine is given
    to the next one only when this one has let go of it.
    """
    items: asyncio.Queue[Item | Exception | None] = asyncio.Queue()

    async def work() -> None:
        try:
            async with place.turn():
                model = await pool.get(served)
                async with aclosing(iterate(lambda: make(model), model.cancel)) as found:
                    async for item in found:
                        items.put_nowait(item)
            items.put_nowait(None)
        except asyncio.CancelledError:
            items.put_nowait(Stopping())  # if anybody still listens
            raise
        except Exception as error:
            items.put_nowait(error)

    task = asyncio.create_task(work())
    _running.add(task)
    task.add_done_callback(_running.discard)
    try:
        while (item := await items.get()) is not None:
            if isinstance(item, Exception):
                raise item
            yield item
    finally:
        task.cancel()


async def finish() -> None:
    """Stop what still runs, say so to whoever listens, and wait for it."""
    for task in list(_running):
        task.cancel()
    await asyncio.gather(*_running, return_exceptions=True)
