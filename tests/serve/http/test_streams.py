"""Streams bring the whole output and its usage, and end with their clients."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from starlette.testclient import TestClient

from calumma.model.document import Document
from calumma.model.generation import SamplingParams
from calumma.serve.http.app import create_app
from calumma.serve.http.streams import wait_all_started
from calumma.serve.http.wire.errors import APIError
from calumma.serve.protocol import Finished, GenerationRequest, RequestFailed, Started, TextDelta, TokenCount
from calumma.serve.settings import ServeSettings

from ..conftest import Step, StubBackend
from .conftest import CHAT, ask, metric, sse_events, stub_settings

PROMPT, COMPLETION = TokenCount(5, 18), TokenCount(3, 36)
STEPS = [Started(PROMPT), TextDelta("seven"), Finished("stop", COMPLETION)]


@pytest.mark.parametrize(
    ("path", "body", "prompts", "choices"),
    [
        (CHAT, ask(n=3), 1, 3),
        ("/v1/completions", {"prompt": ["a", "b"], "n": 3}, 2, 6),
        ("/v1/completions", {"prompt": "a"}, 1, 1),
    ],
)
def test_a_prompt_is_counted_once_and_every_answer_to_it(
    path: str, body: dict[str, Any], prompts: int, choices: int
) -> None:
    expected = {
        "prompt_tokens": prompts * 23,
        "completion_tokens": choices * 39,
        "total_tokens": prompts * 23 + choices * 39,
        "prompt_tokens_details": {"text_tokens": prompts * 5, "image_tokens": prompts * 18},
        "completion_tokens_details": {"text_tokens": choices * 3, "image_tokens": choices * 36},
    }
    with TestClient(create_app(StubBackend(*STEPS), stub_settings())) as client:
        whole = client.post(path, json=body).json()
        streamed = client.post(path, json=body | {"stream": True, "stream_options": {"include_usage": True}})
    assert whole["usage"] == expected
    assert len(whole["choices"]) == choices
    *_, last = sse_events(streamed.text)
    assert (last["choices"], last["usage"]) == ([], expected)


def second_fails(request: GenerationRequest) -> list[Step]:
    if request.id.endswith("-1"):
        return [RequestFailed(429, "the queue is full", code="overloaded")]
    return [Started(PROMPT), asyncio.Event().wait]


def test_the_first_failure_of_several_choices_ends_the_others() -> None:
    for stream in (False, True):
        backend = StubBackend(script=second_fails)
        with TestClient(create_app(backend, stub_settings())) as client:
            assert client.post(CHAT, json=ask(n=3, stream=stream)).status_code == 429
        assert backend.endings == ["stopped"] * 3


def test_streams_are_closed_by_the_first_failure_among_them() -> None:
    backend = StubBackend(script=second_fails)

    async def start() -> None:
        requests = [GenerationRequest(f"a-{k}", Document(()), SamplingParams()) for k in range(3)]
        streams = [backend.generate(request) for request in requests]
        with pytest.raises(APIError, match="the queue is full"):
            await wait_all_started(streams)
        assert backend.endings == ["stopped"] * 3

    asyncio.run(start())


def test_the_work_of_a_client_that_leaves_is_given_up(settings: ServeSettings) -> None:
    backend = StubBackend(Started(TokenCount(3)), asyncio.Event().wait)
    app = create_app(backend, settings)

    async def leave() -> None:
        body = json.dumps(ask()).encode()
        scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "path": CHAT,
            "raw_path": CHAT.encode(), "query_string": b"",
            "headers": [(b"host", b"localhost"), (b"content-type", b"application/json")],
            "scheme": "http", "server": ("test", 80), "client": ("test", 1), "root_path": "",
        }  # fmt: skip

        async def receive() -> Any:
            return {"type": "http.request", "body": body, "more_body": False}

        async def send(message: Any) -> None:
            raise AssertionError("nothing is there to be sent yet")

        request = asyncio.create_task(app(scope, receive, send))
        with TestClient(app) as client:
            while metric(client, 'calumma_requests_running{model="tiny"}') == 0:
                assert not request.done(), request
                await asyncio.sleep(0.01)
        request.cancel()  # what Ray Serve does when the client is gone
        with pytest.raises(asyncio.CancelledError):
            await request

    asyncio.run(leave())
    assert backend.endings == ["stopped"]
    with TestClient(app) as client:
        assert metric(client, 'calumma_requests_running{model="tiny"}') == 0
        assert metric(client, f'calumma_requests_total{{endpoint="{CHAT}",status="499"}}') == 1
