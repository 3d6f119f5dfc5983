"""The outermost layer of the HTTP application: no body above the limit gets in, every request is counted."""

from __future__ import annotations

import asyncio
import time

from fastapi.responses import JSONResponse
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from calumma.serve.metrics import Metrics
from calumma.serve.wire import WireError

CODE = "request_too_large"
CLIENT_GONE = 499  # in the metrics only: nobody is there to receive it (nginx's number)


def too_large(limit: int) -> HTTPException:
    """As an HTTPException, the only kind of error that FastAPI lets out while it reads a body."""
    message = f"the body is larger than the {limit / 2**20:g} MiB this server takes; send fewer or smaller images"
    return HTTPException(413, message)


class Gate:
    """ASGI middleware. A body without a length is counted as it comes; then reading it fails with status 413."""

    def __init__(self, app: ASGIApp, metrics: Metrics, max_body_bytes: int) -> None:
        self._app = app
        self._metrics = metrics
        self._limit = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begin, status, read = time.monotonic(), 500, 0

        async def limited() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > self._limit:
                raise too_large(self._limit)
            return message

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            length = Headers(scope=scope).get("content-length", "0")
            if length.isdecimal() and int(length) > self._limit:
                error = WireError(too_large(self._limit).detail, status=413, code=CODE)
                await JSONResponse(error.body, error.status)(scope, receive, noted)
            else:
                await self._app(scope, limited, noted)
        except asyncio.CancelledError:
            status = CLIENT_GONE
            raise
        finally:
            self._metrics.finished(_endpoint(scope), status, time.monotonic() - begin)


def _endpoint(scope: Scope) -> str:
    """The path of the route, not of the request: there are few of them."""
    return getattr(scope.get("route"), "path", "other")
