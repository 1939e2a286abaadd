"""The ASGI application: which path leads where, and who stands before it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from edgelm_apps.server import jobs
from edgelm_apps.server.bodies import refusal
from edgelm_apps.server.errors import Left, NoSuchRoute
from edgelm_apps.server.guard import Guard
from edgelm_apps.server.pool import Pool
from edgelm_apps.server.routes import PAGE, Server, Settings


def create_app(pool: Pool, settings: Settings) -> Starlette:
    """Return the ASGI application."""
    server = Server(pool, settings)

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        yield
        await jobs.finish()
        await asyncio.to_thread(pool.close)

    def route(path: str, handler: Callable[[Request], Awaitable[Response]], method: str = "GET") -> Route:
        async def counted(http: Request) -> Response:
            try:
                response = await handler(http)
            except Left:
                server.metrics.cancelled.inc()
                response = Response(status_code=499)
            except Exception as error:
                response = refusal(error)
            server.metrics.requests.labels(path, response.status_code).inc()
            return response

        return Route(path, counted, methods=[method], name=handler.__name__)

    routes = [
        route("/v1/chat/completions", server.chat, "POST"),
        route("/v1/completions", server.completion, "POST"),
        route("/v1/responses", server.respond, "POST"),
        route("/v1/embeddings", server.embeddings, "POST"),
        route("/v1/models", server.models),
        route("/v1/models/{name:path}", server.model),
        route("/v1/status", server.status),
        route("/v1/budget", server.budget, "POST"),
        route("/health", server.health),
        route("/metrics", server.metrics_text),
        route("/openapi.json", server.openapi),
        route("/", server.page),
        Mount("/page", StaticFiles(directory=PAGE), name="page"),
    ]
    middleware = [
        Middleware(Guard, settings.key, settings.origins, settings.names, settings.most_bytes),
    ]
    if settings.origins:
        cors = Middleware(
            CORSMiddleware, allow_origins=list(settings.origins), allow_methods=["*"], allow_headers=["*"]
        )
        middleware.insert(0, cors)
    return Starlette(
        routes=routes, middleware=middleware, lifespan=lifespan, exception_handlers={HTTPException: _no_route}
    )


async def _no_route(http: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return refusal(NoSuchRoute(http.method, http.url.path, error.status_code), dict(error.headers or {}))
