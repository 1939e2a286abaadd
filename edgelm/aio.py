"""Streams for asyncio: a blocking generator runs in a thread of its own, its items arrive in the event loop."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import closing
from typing import TypeVar

Item = TypeVar("Item")


async def iterate(
    make: Callable[[], Generator[Item, None, None]], cancel: Callable[[], None]
) -> AsyncGenerator[Item, None]:
    """Yield what `make()` yields. If the caller stops early, `cancel` is called and the thread is waited for."""
    loop = asyncio.get_running_loop()
    queue: asyncio.Queue[tuple[Item | None, BaseException | None]] = asyncio.Queue()
    left = threading.Event()

    def put(item: Item | None, error: BaseException | None) -> None:
        try:
            loop.call_soon_threadsafe(queue.put_nowait, (item, error))
        except RuntimeError:  # the loop was closed before the stream: nobody listens any more
            left.set()

    def work() -> None:
        try:
            with closing(make()) as items:
                for item in items:
                    if left.is_set():
                        return
                    put(item, None)
            put(None, None)
        except BaseException as exc:
            put(None, exc)

    thread = threading.Thread(target=work, name="edgelm-stream", daemon=True)
    thread.start()
    try:
        while True:
            item, error = await queue.get()
            if error is not None:
                raise error
            if item is None:
                return
            yield item
    finally:
        left.set()
        if thread.is_alive():
            cancel()
            await asyncio.shield(asyncio.to_thread(thread.join))
