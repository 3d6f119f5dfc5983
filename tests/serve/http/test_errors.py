"""Every error has the form of OpenAI's, and tells what is wrong and no secrets."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from starlette.testclient import TestClient

from calumma.serve.http.app import create_app
from calumma.serve.protocol import RequestFailed, Started, TextDelta, TokenCount
from calumma.serve.settings import ServeSettings

from ..conftest import CONTEXT, StubBackend
from .conftest import CHAT, ask, error_of, sse_events


@pytest.mark.parametrize(
    ("body", "status", "param", "says"),
    [
        (ask(model="gpt"), 404, "model", "this server has 'tiny'"),
        (ask("x" * 400), 400, "messages", f"402 tokens.*context of {CONTEXT}"),
        (ask("x" * (CONTEXT - 12), modalities=["image"]), 400, "messages", "18 of an image"),
        ({"messages": [{"role": "robot", "content": "x"}]}, 400, "messages[0].role", "robot"),
        (ask(modalities=["smell"]), 400, "modalities[0]", "'text' or 'image'"),
        (ask(temperature=3), 400, "temperature", "less than or equal to 2"),
        (ask(tools=[{}]), 400, "tools[0].type", "required"),
        (ask(max_tokens=0), 400, "max_tokens", "greater than or equal to 1"),
        ({}, 400, "messages", "required"),
        ([1, 2], 400, None, "JSON object"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_bad_requests(client: TestClient, body: Any, status: int, param: str | None, says: str, stream: bool) -> None:
    if isinstance(body, dict):
        body = body | {"stream": stream}
    response = client.post(CHAT, json=body)
    error = error_of(response)
    assert response.status_code == status
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert re.search(says, error["message"])


@pytest.mark.parametrize(
    ("content", "headers", "says"),
    [
        (b'{"messages": [', {"content-type": "application/json"}, "not valid JSON.*character 14"),
        (b"", {"content-type": "application/json"}, "must be a JSON object|required"),
        (b'{"messages": []}', {"content-type": "text/plain"}, "Content-Type: application/json"),
    ],
)
def test_bodies_that_are_no_json(client: TestClient, content: bytes, headers: dict[str, str], says: str) -> None:
    response = client.post(CHAT, content=content, headers=headers)
    assert response.status_code == 400
    assert re.search(says, error_of(response)["message"])


@pytest.mark.parametrize(
    "body",
    [
        ask(**{"logit_bias": {"\ud800": 1}}),
        ask(model="\ud800"),
        ask(modalities=["\ud800"]),
        ask(size="\ud800", **{"tools": ["\ud800"]}),
        ask(stop=["\ud800" * 10_000, 5]),
        {"messages": [{"role": "\ud800" * 10_000, "content": "x"}]},
        ask(logit_bias={"x" * 100_000: 1}),
    ],
)
def test_what_is_no_unicode_or_endless_is_told_all_the_same(client: TestClient, body: Any) -> None:
    response = client.post(CHAT, content=json.dumps(body), headers={"content-type": "application/json"})
    assert response.status_code in (400, 404)
    assert len(response.content) < 10_000
    error_of(response)


def test_an_image_s_prompt_is_named_as_its_endpoint_names_it(client: TestClient) -> None:
    response = client.post("/v1/images/generations", json={"prompt": "x" * 400})
    assert error_of(response)["param"] == "prompt"


def test_other_errors_have_the_same_form(client: TestClient) -> None:
    assert "the API is below /v1" in error_of(client.get("/v2"))["message"]
    wrong_method = client.get(CHAT)
    assert wrong_method.status_code == 405
    assert "does not take GET" in error_of(wrong_method)["message"]
    assert client.get("/v1/models/other").status_code == 404


LOST = RequestFailed(503, "the replica was lost", code="unavailable")


@pytest.mark.parametrize("stream", [False, True])
def test_a_lost_replica_is_a_503(settings: ServeSettings, stream: bool) -> None:
    with TestClient(create_app(StubBackend(LOST), settings)) as client:
        response = client.post(CHAT, json=ask(stream=stream))
    assert response.status_code == 503
    assert response.headers["retry-after"] == "5"
    assert error_of(response) == {
        "message": "the replica was lost", "type": "server_error", "param": None, "code": "unavailable"
    }  # fmt: skip


def test_a_replica_lost_half_way_ends_the_stream_with_an_error(settings: ServeSettings) -> None:
    with TestClient(create_app(StubBackend(Started(TokenCount(3)), TextDelta("se"), LOST), settings)) as client:
        *chunks, last = sse_events(client.post(CHAT, json=ask(stream=True)).text)
        assert client.post(CHAT, json=ask()).status_code == 503
    assert chunks[-1]["choices"][0]["delta"] == {"content": "se"}
    assert last["error"]["message"] == "the replica was lost"


def test_an_unforeseen_error_tells_no_secrets(settings: ServeSettings) -> None:
    backend = StubBackend(RuntimeError("password=1234"))
    with TestClient(create_app(backend, settings), raise_server_exceptions=False) as client:
        response = client.post(CHAT, json=ask())
    assert response.status_code == 500
    assert "1234" not in response.text
    assert error_of(response)["type"] == "server_error"


@pytest.mark.parametrize("path", ["/", "/health", "/ready", "/v1/models"])
def test_head_is_answered_where_get_is(client: TestClient, path: str) -> None:
    assert client.head(path).status_code == client.get(path).status_code == 200
    assert client.head(CHAT).headers["allow"] == "POST"
