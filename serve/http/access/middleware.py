"""The outermost layer of the HTTP application but for CORS. It measures every request, and refuses requests under names
that are not the server's, bodies above the limit, requests without a valid API key where keys are needed, more requests
at once than are allowed, and all new ones while the server is about to end."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from fastapi.responses import JSONResponse
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from calumma.serve.http.access.api_keys import AccessControl
from calumma.serve.http.access.caller import Caller, called_by
from calumma.serve.http.access.drain import Drain
from calumma.serve.http.access.hosts import HostCheck
from calumma.serve.http.access.key_file import KeyFile
from calumma.serve.http.metrics import Metrics
from calumma.serve.http.wire.errors import APIError
from calumma.serve.settings import APIKey, ServeSettings

TOO_LARGE = "request_too_large"
CLIENT_CLOSED_REQUEST = 499  # in the metrics only: nobody is there to receive it (nginx's number)
RETRY_AFTER = {429: "1", 503: "5"}  # seconds


def too_large(limit: int) -> HTTPException:
    """As an HTTPException, the only kind of error that FastAPI lets out while it reads a body."""
    message = f"the body is larger than the {limit / 2**20:g} MiB this server takes; send fewer or smaller images"
    return HTTPException(413, message)


def error_response(error: APIError, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """OpenAI's error object, with the headers that belong to its status."""
    headers = {**(headers or {})}
    if error.status in RETRY_AFTER:
        headers["Retry-After"] = RETRY_AFTER[error.status]
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(error.body, error.status, headers)


class AccessMiddleware:
    """ASGI middleware. A body without a length is counted as it comes; then reading it fails with status 413."""

    def __init__(self, app: ASGIApp, metrics: Metrics, settings: ServeSettings, drain: Drain) -> None:
        self._app = app
        self._drain = drain
        self._metrics = metrics
        self._limit = settings.max_body_bytes
        self._body_seconds = settings.limits.body_seconds
        self._hosts = HostCheck(settings)
        limits, file = settings.limits, settings.keys_file
        more = KeyFile(Path(file), settings.keys).keys if file else None
        self._access = AccessControl(settings.keys, limits.running, limits.running_per_key, more)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if scope["method"] == "HEAD":  # as GET; the server in front sends the header alone
            scope = {**scope, "method": "GET"}
        begin, status, size, complete = time.monotonic(), 500, 0, False
        deadline = asyncio.get_running_loop().time() + self._body_seconds

        async def receive_limited() -> Message:
            nonlocal size, complete
            try:
                async with asyncio.timeout_at(None if complete else deadline):
                    message = await receive()
            except TimeoutError:
                raise HTTPException(408, f"the body was not there after {self._body_seconds:g} s") from None
            complete = complete or not message.get("more_body", False)
            size += len(message.get("body", b""))
            if size > self._limit:
                raise too_large(self._limit)
            return message

        async def send_observed(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            with self._admit(scope), self._drain.request() if _generates(scope) else contextlib.nullcontext():
                await self._app(scope, receive_limited, send_observed)
        except APIError as error:
            await error_response(error)(scope, receive, send_observed)
        except asyncio.CancelledError:
            status = CLIENT_CLOSED_REQUEST
            raise
        finally:
            self._metrics.observe_request(_endpoint(scope), status, time.monotonic() - begin)

    def _admit(self, scope: Scope) -> contextlib.AbstractContextManager[None]:
        """For the length of a request to the API; pages and probes need nothing. Raises APIError."""
        self._hosts.require(scope)
        headers = Headers(scope=scope)
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length) > self._limit:
            raise APIError(too_large(self._limit).detail, status=413, code=TOO_LARGE)
        if not _is_api(scope["path"]):
            return contextlib.nullcontext()
        if isinstance(caller := scope.get("state", {}).get("caller"), Caller):  # from within this process
            return called_by(caller)
        key = self._access.authenticate(headers.get("authorization", ""))
        scope.setdefault("state", {})["owner"] = None if key is None else key.owner
        return self._slot(key) if _generates(scope) else contextlib.nullcontext()

    @contextlib.contextmanager
    def _slot(self, key: APIKey | None) -> Iterator[None]:
        """One of those that the key may have; what runs meanwhile is the key's."""
        with self._access.slot(key) as answers, called_by(Caller.of(key, answers)):
            yield


def _generates(scope: Scope) -> bool:
    return scope["method"] == "POST" and _is_api(scope["path"])


def _is_api(path: str) -> bool:
    return path.startswith("/v1/") or path in ("/tokenize", "/detokenize", "/tokenizer_info")


def _endpoint(scope: Scope) -> str:
    """The path of the route, not of the request: there are few of them."""
    return getattr(scope.get("route"), "path", "other")
