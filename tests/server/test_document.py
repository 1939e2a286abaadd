"""The server does what its own OpenAPI document says, whatever the requests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from serving import Running, running

from edgelm_apps.server.openapi import document


@pytest.fixture(scope="module")
def small(models: dict[str, Path]) -> Iterator[Running]:
    with running(models, sampling={"max_tokens": 3}) as server:
        yield server


@pytest.fixture(scope="module")
def schemathesis() -> Any:
    return pytest.importorskip("schemathesis")


@pytest.fixture(scope="module")
def api(schemathesis: Any, small: Running) -> Any:
    return schemathesis.openapi.from_url(f"{small.url}/openapi.json")


ROUTES = [(path, method.upper()) for path, methods in document()["paths"].items() for method in methods]


@pytest.mark.parametrize(("path", "method"), ROUTES)
def test_every_route_keeps_its_word(schemathesis: Any, api: Any, path: str, method: str) -> None:
    # the same requests each time: a change is to blame for what fails with it; more with a larger number, by hand
    @settings(max_examples=40, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
    @given(case=api[path][method].as_strategy())
    def check(case: Any) -> None:
        # a body may fit the document and yet be too long for the context, or ask for what a model cannot do
        case.call_and_validate(excluded_checks=[schemathesis.checks.positive_data_acceptance])

    check()


def test_every_field_is_in_the_document() -> None:
    schemas = document()["components"]["schemas"]
    assert {"messages", "tools", "response_format", "logprobs"} <= set(schemas["ChatRequest"]["properties"])
    assert schemas["ChatRequest"]["additionalProperties"] is False
