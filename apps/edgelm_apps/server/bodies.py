"""Bodies of requests and responses: JSON, checked on its way in."""

from __future__ import annotations

import logging
from typing import Any, TypeVar

import msgspec
from starlette.responses import Response

from edgelm_apps.server.errors import Refused, UnknownType, body_of, headers_of, status_of

log = logging.getLogger("edgelm.serve")
Body = TypeVar("Body")


def decoded(content_type: str | None, body: bytes, kind: type[Body]) -> Body:
    """Return the body of a request. Raises `Refused` with the place and the fact of what is wrong with it."""
    if (content_type or "application/json").partition(";")[0].strip().lower() != "application/json":
        raise UnknownType("the body must be JSON; send `Content-Type: application/json`")
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        raise _invalid(error) from error
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise Refused(f"the body is no JSON: {error}") from error


def as_json(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(value), status, headers, media_type="application/json")


def refusal(error: Exception, headers: dict[str, str] | None = None) -> Response:
    """Return the response that tells of an error."""
    log_defect(error)
    return as_json(body_of(error), status_of(error), headers_of(error) | (headers or {}))


def log_defect(error: Exception) -> None:
    """Write an error that nobody foresaw to the log, with where it came from."""
    if status_of(error) == 500:
        log.error("a request failed", exc_info=error)


def _invalid(error: msgspec.ValidationError) -> Refused:
    """Return what is wrong with a body, and where: msgspec says "... - at `$.messages[0]`"."""
    fact, _, where = str(error).partition(" - at ")
    where = where.strip("`").removeprefix("$").removeprefix(".")
    if "unknown field" in fact:
        name = ".".join(filter(None, (where, fact.partition("`")[2].rstrip("`"))))
        refused = Refused(f"{name} is not supported; leave it out", name)
        refused.code = "unsupported_parameter"
        return refused
    refused = Refused(f"{where or 'the body'}: {fact}", where or None)
    refused.code = "invalid_value"
    return refused
