"""Who may ask, and how much: keys, origins and the size of requests, before anything is read."""

from __future__ import annotations

import secrets
from collections.abc import Collection
from typing import TYPE_CHECKING

from starlette.datastructures import Headers

from edgelm_apps.server.bodies import refusal
from edgelm_apps.server.errors import Forbidden, Refused, TooLarge, Unauthorized

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

OPEN = ("/health", "/", "/favicon.ico")
"""Paths that need no key, beside those of the page's files."""
PAGE = "/page/"


class Guard:
    """An ASGI middleware that answers what is not let through."""

    def __init__(self, app: ASGIApp, key: str | None, origins: Collection[str], most_bytes: int) -> None:
        self._app, self._key, self._origins, self._most = app, key, frozenset(origins), most_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            self._check(scope, Headers(scope=scope))
        except Refused as error:
            await refusal(error)(scope, receive, send)
            return
        read = 0

        async def counted() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > self._most:
                raise self._too_large()
            return message

        await self._app(scope, counted, send)

    def _check(self, scope: Scope, headers: Headers) -> None:
        self._check_origin(headers)
        if scope["method"] != "OPTIONS" and scope["path"] not in OPEN and not scope["path"].startswith(PAGE):
            self._check_key(headers)
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > self._most:
            raise self._too_large()

    def _too_large(self) -> TooLarge:
        return TooLarge(f"the request is larger than the {self._most} bytes that are allowed; see --max-request")

    def _check_origin(self, headers: Headers) -> None:
        """A page of another site may neither read answers nor have them computed."""
        origin = headers.get("origin")
        if origin is None or origin in self._origins or "*" in self._origins:
            return
        if origin.partition("://")[2] != headers.get("host"):
            raise Forbidden(f"pages of {origin} may not use this server; start it with --allow-origin {origin}")

    def _check_key(self, headers: Headers) -> None:
        if self._key is None:
            return
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not secrets.compare_digest(given.strip().encode(), self._key.encode()):
            raise Unauthorized("the API key is missing or wrong; send it as `Authorization: Bearer KEY`")
