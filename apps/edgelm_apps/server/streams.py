"""Streams of events: how they begin, live while there is nothing to say, and end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Any, TypeVar

import msgspec
from sse_starlette import EventSourceResponse, ServerSentEvent
from starlette.requests import Request
from starlette.responses import Response

from edgelm_apps.server.errors import Left

SOON_S = 0.5
"""How long a stream waits for its first piece before it begins."""
GRACE_S = 10.0
"""How long answers may go on once the server was asked to stop."""
Item = TypeVar("Item")


def events_response(events: AsyncIterator[ServerSentEvent], keep_alive_s: float) -> Response:
    """Return the response that sends these events, and a comment whenever there is none for so long."""
    return EventSourceResponse(
        events, ping=keep_alive_s, sep="\n", shutdown_grace_period=GRACE_S + 2,  # its last event comes before
        ping_message_factory=alive,
    )  # fmt: skip


def alive() -> ServerSentEvent:
    """Return the comment that says no more than that the stream lives."""
    return ServerSentEvent(comment="still at it", sep="\n")


def as_event(value: dict[str, Any]) -> ServerSentEvent:
    return ServerSentEvent(msgspec.json.encode(value).decode(), event=value.get("type"), sep="\n")


async def joined(first: asyncio.Future[Item], rest: AsyncGenerator[Item, None]) -> AsyncGenerator[Item, None]:
    try:
        yield await first
        async for item in rest:
            yield item
    finally:
        first.cancel()
        await rest.aclose()


async def watched(http: Request, items: AsyncGenerator[Item, None]) -> AsyncIterator[Item]:
    """Yield the items; stop them, and raise `Left`, when the client goes away."""
    me = asyncio.current_task()
    gone = False

    async def watch() -> None:
        nonlocal gone
        while (await http.receive())["type"] != "http.disconnect":
            pass
        gone = True
        if me is not None:
            me.cancel()

    watcher = asyncio.create_task(watch())
    try:
        async with aclosing(items):
            async for item in items:
                yield item
    except asyncio.CancelledError:
        if gone:
            raise Left from None
        raise
    finally:
        watcher.cancel()
