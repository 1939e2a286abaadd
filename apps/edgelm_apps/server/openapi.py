"""The OpenAPI document of this server, from the types that requests are checked with."""

from __future__ import annotations

from functools import cache
from typing import Any

import msgspec

from edgelm import __version__
from edgelm_apps.server.wire import BudgetRequest, ChatRequest, CompletionRequest, EmbeddingRequest, ResponseRequest

_ERRORS = {
    "400": "The request cannot be served as it is.",
    "401": "The API key is missing or wrong.",
    "403": "A page of another origin asks.",
    "404": "There is no such model.",
    "413": "The request is too large.",
    "415": "The body is not JSON.",
    "429": "All places of the queue are taken; Retry-After says when to try again.",
    "500": "A defect, or a model that cannot be computed with.",
    "503": "The model does not fit into the budget.",
}
_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": "string"},
            },
        }
    },
}
_POSTS: dict[str, tuple[str, type, str]] = {
    "/v1/chat/completions": ("Answer a chat.", ChatRequest, "chat.completion"),
    "/v1/completions": ("Go on with a text, without a chat template.", CompletionRequest, "text_completion"),
    "/v1/responses": ("Answer a chat, in the words of the newer API; nothing is stored.", ResponseRequest, "response"),
    "/v1/embeddings": ("Turn texts into vectors.", EmbeddingRequest, "list"),
    "/v1/budget": ("Go over to another memory budget.", BudgetRequest, ""),
}
_GETS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "/v1/models": ("The models that are served.", "application/json", {}),
    "/v1/models/{name}": ("One of them.", "application/json", {}),
    "/v1/status": ("The budget, where it goes, and what the newest answer took.", "application/json", {}),
    "/health": ("Whether requests are served.", "application/json", {}),
    "/metrics": ("Counters for Prometheus.", "text/plain", {}),
}
_EVENTS = ("/v1/chat/completions", "/v1/completions", "/v1/responses")


@cache
def document() -> dict[str, Any]:
    """Return the document, as OpenAPI 3.1 has it."""
    schemas, components = msgspec.json.schema_components(
        [kind for _, kind, _ in _POSTS.values()], ref_template="#/components/schemas/{name}"
    )
    paths: dict[str, Any] = {}
    for (path, (about, _, name)), schema in zip(_POSTS.items(), schemas, strict=True):
        object_ = {"properties": {"object": {"const": name}}, "required": ["object"]} if name else {}
        content = {"application/json": {"schema": {"type": "object"} | object_}}
        if path in _EVENTS:
            content["text/event-stream"] = {}
        paths[path] = {
            "post": {
                "summary": about,
                "operationId": path.strip("/").replace("/", "_"),
                "requestBody": {"required": True, "content": {"application/json": {"schema": schema}}},
                "responses": {"200": {"description": "The answer.", "content": content}} | _errors(_ERRORS),
            }
        }
    for path, (about, media, schema) in _GETS.items():
        found = {"200": {"description": about, "content": {media: {"schema": schema}}}}
        mine = _ERRORS if path.startswith("/v1/") else {key: _ERRORS[key] for key in ("403", "413", "503")}
        get: dict[str, Any] = {
            "summary": about,
            "operationId": path.strip("/").replace("/", "_").replace("{", "").replace("}", ""),
            "responses": found | _errors(mine),
        }
        if "{name}" in path:
            get["parameters"] = [{"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}]
        paths[path] = {"get": get}
    components["Error"] = _ERROR
    return {
        "openapi": "3.1.0",
        "info": {"title": "edgelm", "version": __version__, "description": "Models of this machine, in a budget."},
        "paths": paths,
        "components": {
            "schemas": components,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"key": []}],
    }


def _errors(known: dict[str, str]) -> dict[str, Any]:
    schema = {"schema": {"$ref": "#/components/schemas/Error"}}
    return {status: {"description": text, "content": {"application/json": schema}} for status, text in known.items()}
