"""What goes wrong, as the status and the body that clients of this API expect."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from edgelm import BudgetTooSmall, ContextOverflow, EdgeLMError, UnsupportedModel
from edgelm.errors import Cancelled, ConfigError, ModelNotFound, TemplateError
from edgelm_apps.server.queue import Full


class Refused(Exception):
    """A request that is not served; the message says why and what to do."""

    status, code = 400, "invalid_request"

    def __init__(self, message: str, param: str | None = None) -> None:
        self.param = param
        super().__init__(message)


class Unsupported(Refused):
    """A parameter, or a value of one, that would have no effect."""

    code = "unsupported_parameter"


class NoSuchModel(Refused):
    """No model of this name is served."""

    status, code = 404, "model_not_found"

    def __init__(self, name: str, known: Sequence[str]) -> None:
        super().__init__(f"no model {name!r} is served here; there are: {', '.join(known)}", "model")


class Unauthorized(Refused):
    status, code = 401, "invalid_api_key"


class Forbidden(Refused):
    status, code = 403, "forbidden"


class TooLarge(Refused):
    status, code = 413, "request_too_large"


class Stopping(Refused):
    """The server stops, and the time that answers had to end is over."""

    status, code = 503, "server_stopping"

    def __init__(self) -> None:
        super().__init__("the server stops; ask again when it is back")


class Left(Exception):
    """Whoever asked has gone: there is nobody to answer."""


class UnknownType(Refused):
    status, code = 415, "unsupported_media_type"


class NoSuchRoute(Refused):
    """Nothing is at this path, or not for this method."""

    code = "not_found"

    def __init__(self, method: str, path: str, status: int) -> None:
        self.status = status
        super().__init__(f"there is no {method} {path}; GET /openapi.json lists what there is")


_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


def status_of(error: Exception) -> int:
    """Return the HTTP status of an error."""
    match error:
        case Refused():
            return error.status
        case Full():
            return 429
        case BudgetTooSmall():
            return 503
        case ContextOverflow() | ConfigError() | TemplateError() | UnsupportedModel():
            return 400
        case ModelNotFound():
            return 404
        case Cancelled():
            return 503
        case _:
            return 500


def body_of(error: Exception) -> dict[str, Any]:
    """Return the `error` object of a response, or of the last event of a stream."""
    status = status_of(error)
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    known = isinstance(error, (Refused, Full, EdgeLMError))
    told: dict[str, Any] = {
        "message": str(error) if known else "this is a defect of the server; its log has the details",
        "type": kind,
        "param": getattr(error, "param", None),
        "code": _code(error),
    }
    if isinstance(error, ContextOverflow):
        told |= {"n_prompt_tokens": error.n_prompt_tokens, "n_ctx": error.n_context}
    if isinstance(error, BudgetTooSmall):
        told |= {"budget_bytes": error.given_bytes, "needed_bytes": error.needed_bytes}
    return {"error": told}


def headers_of(error: Exception) -> dict[str, str]:
    """Return the headers that go with an error."""
    match error:
        case Full():
            return {"Retry-After": str(math.ceil(error.retry_s))}
        case Unauthorized():
            return {"WWW-Authenticate": "Bearer"}
        case _:
            return {}


def _code(error: Exception) -> str:
    match error:
        case Refused():
            return error.code
        case Full():
            return "queue_full"
        case ContextOverflow():
            return "context_length_exceeded"
        case BudgetTooSmall():
            return "budget_too_small"
        case ConfigError():
            return "invalid_value"
        case TemplateError():
            return "template_error"
        case Cancelled():
            return "cancelled"
        case EdgeLMError():
            return "model_error"
        case _:
            return "internal_error"
