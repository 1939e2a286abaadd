"""Who is next: one request at a time has the engine, the others wait in a bounded and fair queue.

Knows clients and time, no model. Everything happens in one event loop.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Hashable
from contextlib import asynccontextmanager

_FRESH = 0.3
"""How much the newest turn counts in what one is expected to take."""


class Full(Exception):
    """The queue has no place left; `retry_s` is when one is expected to be free."""

    def __init__(self, retry_s: float) -> None:
        self.retry_s = retry_s
        super().__init__(f"all places of the queue are taken; try again in {retry_s:.0f} s")


class Place:
    """A place in the queue. It is free again after `leave`, or after its turn."""

    def __init__(self, queue: Queue, client: Hashable) -> None:
        self._queue, self.client = queue, client
        self._called: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def call(self) -> None:
        if not self._called.done():
            self._called.set_result(None)

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """Wait for the turn, and hold the engine while inside."""
        began_s: float | None = None
        try:
            await self._called
            began_s = time.monotonic()
            yield
        finally:
            self.leave(None if began_s is None else time.monotonic() - began_s)

    def leave(self, took_s: float | None = None) -> None:
        """Give the place back; `took_s`: what its turn took, if it had one. Later calls do nothing."""
        self._called.cancel()
        self._queue._left(self, took_s)


class Queue:
    """Places for `most` requests beside the one that has the engine. Clients take turns, whoever asks most often."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._waiting: OrderedDict[Hashable, deque[Place]] = OrderedDict()
        self._current: Place | None = None
        self._turn_s = 1.0

    def __len__(self) -> int:
        """How many wait."""
        return sum(map(len, self._waiting.values()))

    @property
    def busy(self) -> bool:
        """Whether a request has the engine."""
        return self._current is not None

    def enter(self, client: Hashable) -> Place:
        """Take a place for a request of `client`. Raises `Full`."""
        if len(self) >= self._most and self.busy:
            raise Full(max(1.0, self._turn_s * (len(self) + 1)))
        place = Place(self, client)
        self._waiting.setdefault(client, deque()).append(place)
        self._next()
        return place

    def _next(self) -> None:
        if self._current is not None or not self._waiting:
            return
        client, places = self._waiting.popitem(last=False)
        self._current = places.popleft()
        if places:  # the others of this client come after a request of everyone else
            self._waiting[client] = places
        self._current.call()

    def _left(self, place: Place, took_s: float | None) -> None:
        if took_s is not None:
            self._turn_s += (took_s - self._turn_s) * _FRESH
        if place is self._current:
            self._current = None
        elif place in (places := self._waiting.get(place.client, deque())):
            places.remove(place)
            if not places:
                del self._waiting[place.client]
        self._next()
