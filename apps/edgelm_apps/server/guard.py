"""Who may ask, and how much: keys, origins and the size of requests, before anything is read."""

from __future__ import annotations

import ipaddress
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

    def __init__(
        self, app: ASGIApp, key: str | None, origins: Collection[str], names: Collection[str], most_bytes: int
    ) -> None:
        """`names`: of this machine."""
        self._app, self._key, self._origins, self._most = app, key, frozenset(origins), most_bytes
        self._names = {name.lower() for name in names} | {_name_in(origin.partition("://")[2]) for origin in origins}

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
        self._check_host(headers)
        self._check_origin(headers)
        if scope["method"] != "OPTIONS" and scope["path"] not in OPEN and not scope["path"].startswith(PAGE):
            self._check_key(headers)
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > self._most:
            raise self._too_large()

    def _too_large(self) -> TooLarge:
        return TooLarge(f"the request is larger than the {self._most} bytes that are allowed; see --max-request")

    def _check_host(self, headers: Headers) -> None:
        """A stranger's name that leads here would make their page one of ours (DNS rebinding), though without a key."""
        name = _name_in(headers.get("host", ""))
        if not name or self._key is not None or "*" in self._origins or name in self._names or _is_address(name):
            return  # who sends no name is no browser
        raise Forbidden(
            f"this server does not go by the name {name!r}; start it with --allow-origin http://{name} or --api-key"
        )

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


def _name_in(host: str) -> str:
    """Return the name or address in a Host header, without the port."""
    return (host.partition("]")[0].strip("[") if host.startswith("[") else host.partition(":")[0]).lower()


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
