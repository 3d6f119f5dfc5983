"""How long a client may take to send a request and to read its answer, on uvicorn's HTTP protocol, which has no such
limits: a header that never ends, or a body that trickles, would hold a connection for ever (Slowloris).

uvicorn runs inside Ray Serve's proxy, where `RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH` names `install`.
"""

from __future__ import annotations

import asyncio
import json
from dataclasses import asdict, dataclass
from typing import Any, Literal

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

KEY = b"calumma:connection-limits"  # of Ray's internal key-value store
LONGEST_HEADER = 2**16  # bytes, request line included
LEAST_READ = 2**15  # bytes that a client must read in `ConnectionLimits.unread`, of more than the buffers hold
MESSAGES = {
    400: "this is no HTTP request",
    408: "the request did not come in time",
    431: f"the request's header has more than {LONGEST_HEADER} bytes",
}


@dataclass(frozen=True)
class ConnectionLimits:
    """Seconds until a request's header, and then its body, must be there, and until a client that does not read what is
    sent to it, or next to nothing of it, is given up."""

    header: float = 10.0
    body: float = 60.0
    unread: float = 60.0


class LimitedProtocol(HttpToolsProtocol):
    """A connection. What it waits for from the client is `_waits_for`; None while the client waits for an answer, and
    while it may be silent between two requests (uvicorn's keep-alive). A wait has one deadline from its beginning."""

    limits = ConnectionLimits()

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._waits_for: Literal["header", "body"] | None = None
        self._deadline: asyncio.TimerHandle | None = None
        self._unread: asyncio.TimerHandle | None = None
        self._header_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._wait("header")

    def connection_lost(self, exc: Exception | None) -> None:
        self._wait(None)
        self.resume_writing()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._waits_for is None and not self._answering:
            self._wait("header")
        if self._waits_for == "header":
            self._header_bytes += len(data)
        super().data_received(data)
        if self.transport.get_protocol() is not self:  # a WebSocket's by now
            self._wait(None)
        elif self._waits_for == "header" and self._header_bytes > LONGEST_HEADER and not self._answering:
            self._refuse(431)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        if self._waits_for is None:
            self._wait("header")

    def on_headers_complete(self) -> None:
        super().on_headers_complete()
        self._wait("body")

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._wait(None)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._waits_for == "header":  # of the next request, which has begun already
            self._begin_wait()

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._unread is None:
            self._await_reading()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None

    def _await_reading(self) -> None:
        left = self.transport.get_write_buffer_size()
        self._unread = self.loop.call_later(self.limits.unread, self._unread_still, left)

    def _unread_still(self, before: int) -> None:
        if before - self.transport.get_write_buffer_size() < LEAST_READ:
            self.transport.abort()
        else:
            self._await_reading()

    def send_400_response(self, msg: str) -> None:
        self._refuse(400)

    @property
    def _answering(self) -> bool:
        """Whether an answer is due or under way."""
        return bool(self.pipeline) or (self.cycle is not None and not self.cycle.response_complete)

    @property
    def _answered(self) -> bool:
        """Whether the request that is being received has an answer already, as one without a key gets it."""
        return self.cycle is not None and self.cycle.response_started

    def _wait(self, what: Literal["header", "body"] | None) -> None:
        self._waits_for, self._header_bytes = what, 0
        self._begin_wait()

    def _begin_wait(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
        if self._waits_for is not None:
            self._deadline = self.loop.call_later(getattr(self.limits, self._waits_for), self._late)

    def _late(self) -> None:
        # It may have come, but nobody reads before the answers ahead of it are sent, or the body's beginning is used.
        ours = bool(self.pipeline) or self.flow.read_paused or (self._waits_for == "header" and self._answering)
        if ours and self._waits_for is not None and not self.transport.is_closing():
            self._begin_wait()
        else:
            self._refuse(408)

    def _refuse(self, status: int) -> None:
        """Say why with OpenAI's error object, where something was begun and nothing said about it yet; then close."""
        begun = self._header_bytes > 0 if self._waits_for == "header" else not self._answered
        self._wait(None)
        if self.transport.is_closing():
            return
        if begun:
            error = {"message": MESSAGES[status], "type": "invalid_request_error", "param": None, "code": None}
            body = json.dumps({"error": error}).encode()
            head = b"content-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n" % len(body)
            self.transport.write(STATUS_LINE[status] + head + body)
        self.transport.close()


def limited(limits: ConnectionLimits) -> type[LimitedProtocol]:
    """The protocol under these limits, for `uvicorn.Config(http=…)`."""
    return type("LimitedProtocol", (LimitedProtocol,), {"limits": limits})


def install() -> list[Any]:
    """Called by Ray Serve's proxy before it listens, for the middlewares it is to have: none; but its connections get
    limits, those that `publish` has left, or else the usual ones."""
    from ray.experimental.internal_kv import _internal_kv_get
    from uvicorn.config import HTTP_PROTOCOLS

    given = _internal_kv_get(KEY)
    limits = ConnectionLimits(**json.loads(given)) if given else ConnectionLimits()
    HTTP_PROTOCOLS["auto"] = limited(limits)  # type: ignore[assignment]  # an import string, or what it would import
    return []


def publish(limits: ConnectionLimits) -> None:
    """Leave the limits in the cluster for proxies that start from now on."""
    from ray.experimental.internal_kv import _internal_kv_put

    _internal_kv_put(KEY, json.dumps(asdict(limits)).encode(), overwrite=True)
