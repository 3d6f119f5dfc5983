"""Every error leaves as OpenAI's error object."""

from __future__ import annotations

import logging

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException
from starlette.routing import Match

from calumma.serve.http.access.middleware import TOO_LARGE, error_response
from calumma.serve.http.wire.errors import APIError, describe_errors

log = logging.getLogger(__name__)


def add_error_handlers(app: FastAPI, there: str = "the API is below /v1, the playground at /") -> None:
    """there: what a client is told that asks for something else."""

    @app.exception_handler(APIError)
    async def api_error(request: Request, error: APIError) -> Response:
        return error_response(error)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        return error_response(_validation(request, error))

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        messages = {
            404: f"there is nothing at {request.url.path}; {there}",
            405: f"{request.url.path} does not take {request.method}",
        }
        code = TOO_LARGE if error.status_code == 413 else None
        message = messages.get(error.status_code, str(error.detail))
        headers = {"Allow": _methods(request)} if error.status_code == 405 else error.headers
        return error_response(APIError(message, status=error.status_code, code=code), headers)

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> Response:
        log.exception("failed to answer %s", request.url.path, exc_info=error)
        return error_response(APIError("the server failed to answer; its log has the details", status=500))


def _methods(request: Request) -> str:
    """What the path takes, for the header Allow."""
    routes = [route for route in request.app.routes if route.matches(request.scope)[0] is not Match.NONE]
    return ", ".join(sorted({method for route in routes for method in getattr(route, "methods", None) or ()}))


def _validation(request: Request, error: RequestValidationError) -> APIError:
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        return APIError(f"the body is not valid JSON: {first['ctx']['error']} at character {first['loc'][-1]}")
    if tuple(first["loc"]) == ("body",):
        if "json" not in request.headers.get("content-type", ""):
            return APIError("send the body as JSON, with the header Content-Type: application/json")
        return APIError("the body must be a JSON object")
    asked = {"body": error.body, "query": dict(request.query_params)}
    place = first["loc"][0]
    errors = [one | {"loc": one["loc"][1:]} for one in error.errors() if one["loc"][0] == place]
    message, param = describe_errors(errors, asked.get(place))
    return APIError(message, param=param, code="invalid_value")
