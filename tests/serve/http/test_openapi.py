"""The OpenAPI document tells what is really sent."""

from __future__ import annotations

from typing import Any

import pytest
from starlette.testclient import TestClient

from calumma.serve.http.app import create_app
from calumma.serve.settings import ServeSettings

from ..conftest import StubBackend


@pytest.fixture
def document(settings: ServeSettings) -> dict[str, Any]:
    with TestClient(create_app(StubBackend(), settings)) as client:
        found: dict[str, Any] = client.get("/openapi.json").json()
    return found


def test_invalid_requests_are_400_with_our_object(document: dict[str, Any]) -> None:
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            assert "422" not in operation["responses"], path
            statuses = {"400", "401", "404", "500", "503"} | (
                {"408", "413", "429", "504"} if method == "post" else set()
            )
            assert statuses <= set(operation["responses"]), path
    assert "HTTPValidationError" not in document["components"]["schemas"]
    error = document["paths"]["/v1/completions"]["post"]["responses"]["400"]
    assert error["content"]["application/json"]["schema"] == {"$ref": "#/components/schemas/ErrorBody"}
    detail = document["components"]["schemas"]["ErrorDetail"]["properties"]
    assert set(detail) == {"message", "type", "param", "code"}


def test_every_endpoint_that_streams_says_so(document: dict[str, Any]) -> None:
    streams = {
        path
        for path, operations in document["paths"].items()
        for operation in operations.values()
        if "text/event-stream" in operation["responses"]["200"]["content"]
    }
    takes_stream = {
        path
        for path, operations in document["paths"].items()
        for operation in operations.values()
        for content in operation.get("requestBody", {}).get("content", {}).values()
        if "stream" in _properties(document, content["schema"])
    }
    assert streams == takes_stream
    assert len(streams) >= 3


def _properties(document: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    """Of a schema, or of those that it is all of."""
    name = schema.get("$ref", "").rpartition("/")[2]
    resolved = document["components"]["schemas"].get(name, schema)
    found: dict[str, Any] = dict(resolved.get("properties", {}))
    for one in resolved.get("allOf", ()):
        found |= _properties(document, one)
    return found


def test_the_api_takes_keys_and_the_probes_need_none(document: dict[str, Any]) -> None:
    for path, operations in document["paths"].items():
        for operation in operations.values():
            assert ("security" in operation) == (path not in ("/health", "/ready", "/metrics")), path
    assert "text/plain" in document["paths"]["/metrics"]["get"]["responses"]["200"]["content"]
