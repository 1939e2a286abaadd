"""Start the server, load the first model, and stop in good order."""

from __future__ import annotations

import asyncio
import signal
import socket
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import uvicorn

from edgelm.errors import ConfigError
from edgelm_apps.output import note
from edgelm_apps.server import jobs
from edgelm_apps.server.app import create_app
from edgelm_apps.server.pool import Pool
from edgelm_apps.server.routes import Settings
from edgelm_apps.server.streams import GRACE_S


class Listening(uvicorn.Server):
    """A server whose answers have `grace_s` to end when it stops; those that take longer end with an error."""

    grace_s = GRACE_S

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        ending = asyncio.create_task(self._end_answers())
        try:
            await super().shutdown(sockets)
        finally:
            ending.cancel()

    async def _end_answers(self) -> None:
        await asyncio.sleep(self.grace_s)
        await jobs.finish()


def run(
    models: Mapping[str, Path],
    engine: Mapping[str, Any],
    settings: Settings,
    host: str,
    port: int,
    quiet: bool,
    shelf_bytes: int,
) -> int:
    """Serve until the process is told to stop; return its exit code. Raises what loading the first model raises."""
    told = (lambda _: None) if quiet else note
    listener = listen(host, port)
    pool = Pool(models, engine, told, shelf_bytes)
    try:
        first = next(iter(pool.served.values()))
        asyncio.run(pool.get(first))
        where = listener.getsockname()
        address = f"[{where[0]}]" if ":" in where[0] else where[0]
        told(f"http://{address}:{where[1]}/ for people, http://{address}:{where[1]}/v1 for programs; Ctrl-C stops it")
        config = uvicorn.Config(
            create_app(pool, settings), log_level="warning", access_log=False, lifespan="on",
            timeout_graceful_shutdown=int(GRACE_S) + 5, server_header=False, http="h11", ws="none",
        )  # fmt: skip
        for number in (signal.SIGINT, signal.SIGTERM):  # uvicorn raises them once more when all is done
            signal.signal(number, lambda *_: None)
        Listening(config).run(sockets=[listener])
    finally:
        pool.close()
        listener.close()
    return 0


def listen(host: str, port: int) -> socket.socket:
    """Return a listening socket. Raises `ConfigError` if the address is taken or none of this machine."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # with the protocol named, asyncio sends at once: without, answers wait 40 ms for acknowledgements
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    if sys.platform != "win32":
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(128)
    except OSError as error:
        listener.close()
        raise ConfigError(f"cannot listen on {host}:{port} ({error.strerror}); choose another --port") from error
    return listener
