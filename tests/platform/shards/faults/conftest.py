"""A proxy before the S3 server that answers a share of the requests badly, the same ones every time."""

from __future__ import annotations

import hashlib
import http.client
import socket
import struct
import threading
from collections import Counter, defaultdict
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

import pytest

DELAY, TIMEOUT = 3.0, 1.5  # seconds, of the proxy and of the clients of tests with delays: a busy machine is no delay
_ERROR = "<?xml version='1.0'?><Error><Code>{}</Code><Message>by the proxy</Message></Error>"


class FaultProxy:
    """Which request is answered how is decided by the request, by how often it was made, and by the seed: threads may
    come in any order. After `most` bad answers in a row a request gets a good one."""

    def __init__(self, upstream: str) -> None:
        self.upstream = urlsplit(upstream).netloc
        self.kinds: tuple[str, ...] = ()
        self.share = 0.0
        self.seed = 0
        self.most = 3
        self.answers: dict[tuple[str, str, str], list[str]] = defaultdict(list)
        """(method, path, range) -> how it was answered, in order: a kind of fault, or ""."""
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def disturb(self, *kinds: str, share: float = 0.4, seed: int = 0, most: int = 3) -> None:
        """From now on; forgets the answers so far."""
        self.answers.clear()
        self.kinds, self.share, self.seed, self.most = kinds, share, seed, most

    @property
    def faults(self) -> Counter[str]:
        return Counter(kind for answers in self.answers.values() for kind in answers if kind)

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def next_fault(self, method: str, path: str, part: str) -> str:
        key = (method, path, part)
        with self._lock:
            before = self.answers[key]
            digest = hashlib.sha256(f"{self.seed} {key} {len(before)}".encode()).digest()
            bad = bool(self.kinds) and int.from_bytes(digest[:4]) < self.share * 2**32
            kind = self.kinds[int.from_bytes(digest[4:8]) % len(self.kinds)] if bad else ""
            if len(before) >= self.most and all(before[-self.most :]):
                kind = ""
            before.append(kind)
        return kind

    def _handler(proxy) -> type[BaseHTTPRequestHandler]:
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def forward(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                part = self.headers.get("Range", "")
                kind = proxy.next_fault(self.command, self.path, part)
                if kind in ("drop", "reset"):
                    return self.break_off(kind == "reset")
                if kind == "error":
                    return self.answer(500, {}, _ERROR.format("InternalError").encode())
                if kind == "slow down":
                    return self.answer(503, {}, _ERROR.format("SlowDown").encode())
                if kind == "delay":
                    threading.Event().wait(DELAY)
                upstream = http.client.HTTPConnection(proxy.upstream)
                upstream.request(self.command, self.path, body, dict(self.headers.items()))
                answer = upstream.getresponse()
                content = answer.read()
                upstream.close()
                headers = dict(answer.getheaders())
                if kind == "corrupt" and content:
                    place = len(content) * 7 // 11
                    content = content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :]
                if kind == "short":
                    content = content[: len(content) // 2]
                self.answer(answer.status, headers, content, cut=kind == "truncate")
                return None

            def answer(self, status: int, headers: dict[str, str], content: bytes, cut: bool = False) -> None:
                self.send_response(status)
                for name, value in headers.items():
                    if name.lower() not in ("content-length", "transfer-encoding", "connection", "date", "server"):
                        self.send_header(name, value)
                told = headers.get("Content-Length", "0") if self.command == "HEAD" else str(len(content))
                self.send_header("Content-Length", told)
                self.end_headers()
                self.wfile.write(content[: len(content) // 2] if cut else content)
                if cut:
                    self.wfile.flush()
                    self.break_off(reset=False)

            def break_off(self, reset: bool) -> None:
                if reset:  # closing with something unsent is a reset
                    self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    self.connection.close()
                else:
                    self.connection.shutdown(socket.SHUT_RDWR)
                self.close_connection = True

            def log_message(self, *arguments: Any) -> None:
                pass

            do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = forward

        return Handler


@pytest.fixture(scope="module")
def proxy_server(s3_server: str) -> Iterator[FaultProxy]:
    proxy = FaultProxy(s3_server)
    yield proxy
    proxy.stop()


@pytest.fixture
def proxy(
    proxy_server: FaultProxy, s3: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> Iterator[FaultProxy]:
    """The proxy, which `s3` now leads through; clients wait little between attempts."""
    import time

    from calumma.platform.storage import client

    sleep = time.sleep
    monkeypatch.setattr(time, "sleep", lambda seconds: sleep(seconds * 0.001))
    if "delay" in request.node.name:
        monkeypatch.setattr(client, "_READ_TIMEOUT", TIMEOUT)
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy_server.endpoint)
    client._client_for.cache_clear()
    proxy_server.disturb()
    yield proxy_server
    proxy_server.disturb()
    client._client_for.cache_clear()
