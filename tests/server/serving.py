"""A server in a thread of the test's process, on a free port."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvicorn

from edgelm_apps.server.app import create_app
from edgelm_apps.server.pool import Pool
from edgelm_apps.server.routes import Settings

ENGINE = {"memory": "2GB", "backend": "numpy", "threads": 1, "context": 512}
PATIENCE_S = 20.0


class Running:
    """Where it listens, and what it is made of."""

    def __init__(self, port: int, pool: Pool) -> None:
        self.url, self.pool = f"http://127.0.0.1:{port}", pool


@contextmanager
def running(
    models: dict[str, Path], settings: Settings | None = None, shelf_bytes: int = 0, **engine: Any
) -> Iterator[Running]:
    """Serve models while inside."""
    pool = Pool(models, {**ENGINE, **engine}, shelf_bytes=shelf_bytes)
    app = create_app(pool, settings or Settings())
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen()  # so that whoever is early waits
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", ws="none", timeout_graceful_shutdown=5))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        yield Running(listener.getsockname()[1], pool)
    finally:
        server.should_exit = True
        thread.join(PATIENCE_S)
        listener.close()
        assert not thread.is_alive(), "the server does not stop"
