"""The OpenAPI document: what FastAPI cannot tell from the endpoints' types, namely errors, event streams, and API keys.

FastAPI writes that invalid requests get 422 and its own object: here they get 400 and OpenAI's.
"""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI

from calumma.serve.http.wire.errors import ErrorBody

ERRORS: dict[int, str] = {
    400: "the request is not one that can be answered; `param` names the field",
    401: "an API key is needed, or is not known here",
    404: "there is no such thing: a model, a file, a batch",
    408: "the body was not there in time",
    413: "the body is larger than the server takes",
    429: "too many requests at once; `Retry-After` says when to try again",
    500: "the server failed; its log has the details",
    503: "no replica is well; `Retry-After` says when to try again",
    504: "the answer was not ready in time",
}
OF_ANY_METHOD = (400, 401, 404, 500, 503)
OPEN_PATHS = ("/health", "/ready", "/metrics")  # no key is needed
KEY = "API key"
EVENTS = "text/event-stream"


def event_stream(what: str) -> dict[int | str, dict[str, Any]]:
    """The second form of an endpoint's answer, where the request has `stream: true`. what: of each event's data."""
    data = {"type": "string", "contentMediaType": "application/json", "description": f"{what}, or [DONE] at the end"}
    schema = {
        "type": "object",
        "description": "one event of the stream",
        "properties": {"event": {"type": "string"}, "data": data},
        "required": ["data"],
    }
    return {200: {"content": {EVENTS: {"schema": schema}}}}


def complete_openapi(app: FastAPI) -> None:
    """To be called when the application has all its routes."""
    generate = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            _complete(generate())
        return app.openapi_schema or {}

    app.openapi = openapi  # type: ignore[method-assign]


def _complete(document: dict[str, Any]) -> None:
    components = document.setdefault("components", {})
    schemas = components.setdefault("schemas", {})
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    definition = ErrorBody.model_json_schema(ref_template="#/components/schemas/{model}")
    schemas |= definition.pop("$defs", {}) | {"ErrorBody": definition}
    components["securitySchemes"] = {KEY: {"type": "http", "scheme": "bearer"}}
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            responses = operation["responses"]
            responses.pop("422", None)
            for status, description in ERRORS.items():
                if method == "post" or status in OF_ANY_METHOD:
                    content = {"application/json": {"schema": {"$ref": "#/components/schemas/ErrorBody"}}}
                    responses.setdefault(str(status), {"description": description, "content": content})
            if path not in OPEN_PATHS:
                operation["security"] = [{KEY: []}, {}]
    for path, form in (("/metrics", "text/plain"), ("/health", "application/json"), ("/ready", "application/json")):
        for code in ("200", "503"):
            response = document["paths"][path]["get"]["responses"][code]
            response["content"] = {form: {"schema": {} if form == "application/json" else {"type": "string"}}}
