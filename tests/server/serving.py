"""A server in a thread of the test's process, on a free port."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edgelm_apps.server.pool import Pool

ENGINE = {"memory": "2GB", "backend": "numpy", "threads": 1, "context": 512}
PATIENCE_S = 20.0


class Running:
    """Where it listens, and what it is made of."""

    def __init__(self, port: int, pool: Pool) -> None:
        self.url, self.pool = f"http://127.0.0.1:{port}", pool


@contextmanager
def running(
    models: dict[str, Path], *, shelf_bytes: int = 0, engine: dict[str, Any] | None = None, **settings: Any
) -> Iterator[Running]:
    """Serve models while inside. What serves is imported here: it takes memory that other tests would count."""
    import uvicorn

    from edgelm_apps.server.app import create_app
    from edgelm_apps.server.pool import Pool
    from edgelm_apps.server.routes import Settings
    from edgelm_apps.server.running import Listening, listen

    pool = Pool(models, {**ENGINE, **(engine or {})}, shelf_bytes=shelf_bytes)
    app = create_app(pool, Settings(**settings))
    listener = listen("127.0.0.1", 0)
    server = Listening(uvicorn.Config(app, log_level="warning", ws="none", timeout_graceful_shutdown=5))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        yield Running(listener.getsockname()[1], pool)
    finally:
        server.should_exit = True
        thread.join(PATIENCE_S)
        listener.close()
        assert not thread.is_alive(), "the server does not stop"
