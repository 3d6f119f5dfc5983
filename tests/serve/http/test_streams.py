"""Streams end with their clients."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from starlette.testclient import TestClient

from calumma.serve.http.app import create_app
from calumma.serve.protocol import Started, TokenCount
from calumma.serve.settings import ServeSettings

from ..conftest import StubBackend
from .conftest import CHAT, ask, metric


def test_the_work_of_a_client_that_leaves_is_given_up(settings: ServeSettings) -> None:
    backend = StubBackend(Started(TokenCount(3)), asyncio.Event().wait)
    app = create_app(backend, settings)

    async def leave() -> None:
        body = json.dumps(ask()).encode()
        scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "path": CHAT,
            "raw_path": CHAT.encode(), "query_string": b"", "headers": [(b"content-type", b"application/json")],
            "scheme": "http", "server": ("test", 80), "client": ("test", 1), "root_path": "",
        }  # fmt: skip

        async def receive() -> Any:
            return {"type": "http.request", "body": body, "more_body": False}

        async def send(message: Any) -> None:
            raise AssertionError("nothing is there to be sent yet")

        request = asyncio.create_task(app(scope, receive, send))
        with TestClient(app) as client:
            while metric(client, 'calumma_requests_running{model="tiny"}') == 0:
                await asyncio.sleep(0.01)
        request.cancel()  # what Ray Serve does when the client is gone
        with pytest.raises(asyncio.CancelledError):
            await request

    asyncio.run(leave())
    assert backend.endings == ["stopped"]
    with TestClient(app) as client:
        assert metric(client, 'calumma_requests_running{model="tiny"}') == 0
        assert metric(client, f'calumma_requests_total{{endpoint="{CHAT}",status="499"}}') == 1
