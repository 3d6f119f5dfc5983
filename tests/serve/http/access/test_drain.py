"""A server that is about to end: streams under way finish, new requests get 503, probes tell."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import openai
import pytest
import requests

from calumma.serve.http.access import drain
from calumma.serve.http.app import create_app
from calumma.serve.protocol import TextDelta

from ...conftest import StubBackend, answered, listening
from ..conftest import ask, stub_settings


def test_a_server_that_is_to_end_finishes_what_it_began_and_takes_nothing_new(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(drain.time, "monotonic", lambda: now)
    let, held = threading.Event(), drain.Drain()

    async def wait() -> None:
        while not let.is_set():
            await asyncio.sleep(0.01)

    started, *rest = answered(TextDelta("seven"))
    backend, settings = StubBackend(started, wait, *rest), stub_settings()
    fields: Any = {"model": "tiny", "messages": ask()["messages"]}
    with (
        listening(create_app(backend, settings, held)) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
    ):
        stream = client.chat.completions.create(stream=True, **fields)
        next(stream)
        assert held.hold(20) == 1, "the stream"
        with pytest.raises(openai.InternalServerError) as refused:
            client.chat.completions.create(**fields)
        assert (refused.value.status_code, refused.value.code) == (503, "shutting_down")
        assert refused.value.response.headers["retry-after"] == "5"
        ready = requests.get(f"{url}/ready", timeout=300)
        assert (ready.status_code, ready.json()) == (503, {"ready": False, "unavailable": {}, "draining": True})
        assert requests.get(f"{url}/health", timeout=300).status_code == 200
        assert client.models.list().data[0].id == "tiny"
        let.set()
        assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == "seven"
        assert held.hold(20) == 0
        now += 21  # whoever ends it has not been heard of since
        assert client.chat.completions.create(**fields).choices[0].message.content == "seven"
