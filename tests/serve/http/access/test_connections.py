"""Clients that send half a request, or slowly, or never read: their connections end, and those of others do not."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import Iterator
from contextlib import closing
from urllib.parse import urlsplit

import pytest
import requests

from calumma.serve.http.access.connections import LONGEST_HEADER, ConnectionLimits, limited
from calumma.serve.http.app import create_app
from calumma.serve.protocol import TextDelta
from calumma.serve.settings import APIKey

from ...conftest import StubBackend, answered, listening
from ..conftest import CHAT, ask, stub_settings

SOON = 0.3  # seconds
HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    app = create_app(StubBackend(), stub_settings())
    with listening(app, http=limited(ConnectionLimits(header=SOON, body=SOON, unread=SOON))) as url:
        yield url


def connection(url: str) -> closing[socket.socket]:
    where = urlsplit(url)
    return closing(socket.create_connection((where.hostname or "", where.port or 0), timeout=300))


def all_of(client: socket.socket) -> bytes:
    """What comes until the server ends the connection."""
    received = b""
    while data := client.recv(65536):
        received += data
    return received


def trickle(client: socket.socket, data: bytes) -> bytes:
    """Send byte by byte, faster than any limit on silence, until the server ends the connection."""
    client.settimeout(SOON / 8)
    received = b""
    for byte in data:
        try:
            client.sendall(bytes([byte]))
            received += (got := client.recv(65536))
            if not got:
                return received
        except TimeoutError:
            continue
        except OSError:
            return received
    raise AssertionError("the server took all of it")


def test_who_says_nothing_is_let_go_without_a_word(url: str) -> None:
    with connection(url) as client:
        assert all_of(client) == b""


@pytest.mark.parametrize(
    "half", [b"P", HEAD, HEAD + b"Content-Length: 9\r\n\r\n{", HEAD + b"Transfer-Encoding: chunked\r\n\r\n5\r\n{}"]
)
def test_half_a_request_is_told_so_and_ended(url: str, half: bytes) -> None:
    with connection(url) as client:
        client.sendall(half)
        head, _, body = all_of(client).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 408 ")
    assert b"connection: close" in head
    assert json.loads(body)["error"]["message"] == "the request did not come in time"


@pytest.mark.parametrize(
    "begin", [b"", HEAD, HEAD + b"Content-Length: 900\r\n\r\n", HEAD + b"Transfer-Encoding: chunked\r\n\r\n"]
)
def test_what_trickles_is_not_waited_for_either(url: str, begin: bytes) -> None:
    """A limit on silence alone would wait for ever."""
    rest = {b"": b"\r\n" * 100, HEAD: b"X-Trickle: " + b"a" * 100}.get(begin, b"1\r\n \r\n" * 40)
    with connection(url) as client:
        client.sendall(begin)
        begun = time.monotonic()
        trickle(client, rest)
        assert time.monotonic() - begun > SOON * 0.9


def test_the_wait_begins_anew_with_every_request_of_a_connection(url: str) -> None:
    with connection(url) as client:
        for _ in range(3):
            client.sendall(b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert b"tiny" in client.recv(65536)
            time.sleep(SOON * 1.5)  # uvicorn's keep-alive goes on for 5 s
        client.sendall(b"GET /v1/models HTTP/1.1\r\nHost:")
        assert all_of(client).startswith(b"HTTP/1.1 408 ")


def test_an_answer_may_take_longer_than_a_request(url: str) -> None:
    async def pause() -> None:
        await asyncio.sleep(1.2)

    app = create_app(StubBackend(*answered(TextDelta("a"), pause, TextDelta("b"))), stub_settings())  # type: ignore[arg-type]
    with listening(app, http=limited(ConnectionLimits(1.0, 1.0, 1.0))) as slow:
        body = json.dumps(ask()).encode()
        whole = HEAD + b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
        with connection(slow) as client:
            client.sendall(whole + b"GET /v1/mod")  # the next request has begun
            first = b""
            while b'"ab"' not in first:
                first += client.recv(65536)
            client.sendall(b"els HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            assert b"tiny" in all_of(client)


def test_who_was_refused_cannot_go_on_sending() -> None:
    locked = create_app(StubBackend(), stub_settings(keys=(APIKey(name="a", sha256="0" * 64),)))
    with listening(locked, http=limited(ConnectionLimits(SOON, SOON, SOON))) as url, connection(url) as client:
        client.sendall(HEAD + b"Content-Length: 900\r\n\r\n")
        assert client.recv(65536).startswith(b"HTTP/1.1 401 ")
        assert trickle(client, b" " * 100) == b"", "it has its answer"


def test_a_header_has_an_end(url: str) -> None:
    with connection(url) as client:
        client.sendall(HEAD + b"X-Long: " + b"a" * LONGEST_HEADER)
        assert all_of(client).startswith(b"HTTP/1.1 431 ")


def test_what_is_no_request_gets_an_error_object(url: str) -> None:
    with connection(url) as client:
        client.sendall(b"\x16\x03\x01\x02\x00 a TLS client\r\n\r\n")
        head, _, body = all_of(client).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 ")
    assert json.loads(body)["error"]["type"] == "invalid_request_error"


def test_who_does_not_read_is_given_up() -> None:
    backend = StubBackend(*answered(*[TextDelta("x" * 2**20)] * 40))
    app = create_app(backend, stub_settings())
    body = json.dumps(ask(stream=True)).encode()
    with listening(app, http=limited(ConnectionLimits(SOON, SOON, SOON))) as url, connection(url) as client:
        client.sendall(HEAD + b"Content-Length: %d\r\n\r\n%s" % (len(body), body))
        while not backend.endings:
            time.sleep(0.05)
        assert backend.endings == ["stopped"]
        assert len(all_of(client)) < 40 * 2**20


def test_who_reads_slowly_gets_all() -> None:
    """A large answer is handed over at once, and takes longer than the limit on silence to be read."""
    size = 16 * 2**20
    app = create_app(StubBackend(*answered(TextDelta("x" * size))), stub_settings())
    body = json.dumps(ask()).encode()
    with listening(app, http=limited(ConnectionLimits(9, 9, 1.0))) as url, socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**18)
        client.connect((urlsplit(url).hostname, urlsplit(url).port))
        client.sendall(HEAD + b"Connection: close\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
        received = 0
        while data := client.recv(2**19):
            received += len(data)
            time.sleep(SOON / 30)
    assert received > size


def test_others_are_served_beside_a_hundred_halves(url: str) -> None:
    halves = [socket.create_connection((urlsplit(url).hostname or "", urlsplit(url).port or 0)) for _ in range(100)]
    try:
        for half in halves:
            half.sendall(HEAD)
        assert requests.post(url + CHAT, json=ask(), timeout=300).status_code == 200
        assert all(all_of(half).startswith(b"HTTP/1.1 408 ") for half in halves)
    finally:
        for half in halves:
            half.close()
