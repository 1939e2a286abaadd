"""Keep files that somebody else maps or reads from staying in the page cache, which is memory that nobody budgeted.

For libraries that read their weights themselves. Where the system does not tell what is cached, nothing happens.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from edgelm.memory.platform import current_platform

EVERY_S = 0.01
CACHED_SHARE = 0.5
"""A file of which so much is cached before was cached by somebody: it stays as it is."""


@contextmanager
def uncached(paths: Sequence[Path]) -> Iterator[None]:
    """While inside, and at the end, drop from the cache what has been read of these files and is no longer mapped."""
    system = current_platform()
    handles: list[int] = []
    done = threading.Event()

    def drop() -> None:
        for handle in handles:
            with suppress(OSError):
                system.drop_cache(handle)

    def work() -> None:
        while not done.wait(EVERY_S):
            drop()

    worker = threading.Thread(target=work, daemon=True)
    try:
        for path in paths:
            handle = system.open_buffered(str(path))
            n_bytes = system.identity(handle)[0]
            if system.cached_bytes(handle, 0, n_bytes) < CACHED_SHARE * n_bytes:
                handles.append(handle)
            else:
                system.close(handle)
        if handles:
            worker.start()
        yield
    finally:
        done.set()
        if worker.ident is not None:
            worker.join()
        drop()
        for handle in handles:
            system.close(handle)
