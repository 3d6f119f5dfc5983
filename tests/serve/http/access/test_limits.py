"""What one request may ask for, and how long it may take."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import socket
from collections.abc import Callable, Iterator
from typing import Any

import openai
import pytest
from PIL import Image as PILImage
from starlette.testclient import TestClient

from calumma.serve.http.app import create_app
from calumma.serve.protocol import Started, TextDelta, TokenCount
from calumma.serve.replica.replica import EngineReplica
from calumma.serve.settings import Limits

from ...conftest import StubBackend, answered, listening
from ..conftest import CHAT, ask, error_of, stub_settings


def png(width: int, height: int) -> str:
    buffer = io.BytesIO()
    PILImage.new("1", (width, height)).save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def with_images(*urls: str) -> dict[str, Any]:
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return ask() | {"messages": [{"role": "user", "content": parts}]}


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (ask(max_tokens=9), "may have 8 tokens here, 9 were asked for"),
        (ask(n=4), "3 answers here, found 4"),
        (ask(stop=["a", "b", "c"]), "2 stop strings here, found 3"),
        (with_images(*[png(2, 2)] * 3), "3 images; this server takes 2"),
        (with_images(png(11, 10)), "11x10 pixels; this server takes 100"),
        # 81 million pixels in a few kilobytes: refused by its header, and never decoded
        (with_images(png(9000, 9000)), "9000x9000 pixels"),
        (with_images(png(20_000, 20_000)), "20000x20000 pixels"),
    ],
)
def test_what_goes_beyond_a_limit_is_told_the_limit(body: dict[str, Any], says: str) -> None:
    limits = Limits(tokens=8, choices=3, stops=2, images=2, pixels=100)
    with TestClient(create_app(StubBackend(), stub_settings(limits=limits, max_body_mebibytes=1))) as client:
        response = client.post(CHAT, json=body)
        assert response.status_code == 400
        assert says in error_of(response)["message"]


@pytest.mark.parametrize(
    "body",
    [ask(max_tokens=8), ask(n=3), ask(stop=["a", "b"]), with_images(png(2, 2), png(2, 2)), with_images(png(10, 10))],
)
def test_what_a_limit_allows_is_answered(body: dict[str, Any]) -> None:
    limits = Limits(tokens=8, choices=3, stops=2, images=2, pixels=100)
    with TestClient(create_app(StubBackend(), stub_settings(limits=limits))) as client:
        assert client.post(CHAT, json=body).status_code == 200


@pytest.mark.parametrize(("path", "body"), [(CHAT, ask()), ("/v1/completions", {"prompt": "hi"})])
def test_who_asks_for_no_number_of_tokens_gets_no_more_than_the_limit(path: str, body: dict[str, Any]) -> None:
    backend = StubBackend()
    with TestClient(create_app(backend, stub_settings(limits=Limits(tokens=8)))) as client:
        assert client.post(path, json=body | {"max_tokens": 9}).status_code == 400
        assert client.post(path, json=body | {"max_tokens": 5}).status_code == 200
        assert client.post(path, json=body).status_code == 200
    assert [request.max_tokens for request in backend.requests] == [5, 8]


def test_stop_strings_of_a_completion_are_counted_too() -> None:
    with TestClient(create_app(StubBackend(), stub_settings(limits=Limits(stops=1)))) as client:
        assert client.post("/v1/completions", json={"prompt": "a", "stop": ["a", "b"]}).status_code == 400


def test_several_prompts_count_as_choices() -> None:
    with TestClient(create_app(StubBackend(), stub_settings(limits=Limits(choices=3)))) as client:
        assert client.post("/v1/completions", json={"prompt": ["a", "b"], "n": 2}).status_code == 400
        assert client.post("/v1/completions", json={"prompt": ["a", "b", "c"]}).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_is_late_ends_with_an_error(stream: bool) -> None:
    endless = StubBackend(Started(TokenCount(3)), asyncio.Event().wait)
    with TestClient(create_app(endless, stub_settings(limits=Limits(seconds=0.2)))) as client:
        response = client.post(CHAT, json=ask(stream=stream))
        if stream:
            *_, last, end = response.text.strip().split("\n\n")
            assert end == "data: [DONE]"
            error = json.loads(last.removeprefix("data: "))["error"]
        else:
            assert response.status_code == 504
            error = error_of(response)
        assert error["code"] == "deadline_exceeded"
        assert "0.2 s" in error["message"]


def test_an_answer_that_never_stops_coming_ends_with_an_error_too() -> None:
    async def moment() -> None:
        await asyncio.sleep(0.05)

    drip = [step for number in range(60) for step in (TextDelta(f"{number} "), moment)]
    with TestClient(create_app(StubBackend(*answered(*drip)), stub_settings(limits=Limits(seconds=0.3)))) as client:  # type: ignore[arg-type]
        response = client.post(CHAT, json=ask())
    assert (response.status_code, error_of(response)["code"]) == (504, "deadline_exceeded")


def test_a_body_that_does_not_come_is_not_waited_for() -> None:
    with listening(create_app(StubBackend(), stub_settings(limits=Limits(body_seconds=0.2)))) as url:
        host, port = url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as client:
            client.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 90\r\n")
            client.sendall(b"Content-Type: application/json\r\n\r\n{")
            assert b" 408 " in client.recv(100)


def test_a_replica_whose_line_is_full_says_so(model: Any) -> None:
    replica = EngineReplica(model, max_sequences=3, max_queued=1)
    try:
        with listening(create_app(replica, stub_settings())) as url:
            client = openai.OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0)
            fields: Any = {"model": "tiny", "messages": ask()["messages"], "extra_body": {"modalities": ["image"]}}
            streams: list[Any] = []

            def fill() -> None:
                for _ in range(20):
                    streams.append(client.chat.completions.create(stream=True, **fields))

            with pytest.raises(openai.RateLimitError, match="in line already"):
                fill()
            for stream in streams:
                assert [c.choices[0].finish_reason for c in stream][-1] == "stop"
    finally:
        replica.close()


LIMIT = 2**18  # of a body, 0.25 MiB


def chunked(size: int) -> Iterator[bytes]:
    for begin in range(0, size, 10_000):
        yield b" " * min(10_000, size - begin)


@pytest.mark.parametrize("send", [lambda size: b" " * size, chunked], ids=["length", "chunks"])
def test_a_body_above_the_limit_is_refused_and_one_of_just_that_size_is_read(
    client: TestClient, send: Callable[[int], Any]
) -> None:
    json_body = {"content-type": "application/json"}
    response = client.post(CHAT, content=send(LIMIT + 1), headers=json_body)
    error = error_of(response)
    assert (response.status_code, error["code"]) == (413, "request_too_large")
    assert "0.25 MiB" in error["message"]
    read = client.post(CHAT, content=send(LIMIT), headers=json_body)
    assert (read.status_code, "JSON" in error_of(read)["message"]) == (400, True)
