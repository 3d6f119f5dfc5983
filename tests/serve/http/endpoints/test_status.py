"""Models, health and the page."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from starlette.testclient import TestClient

from calumma.serve.http import facts
from calumma.serve.http.app import create_app
from calumma.serve.settings import ServeSettings

from ...conftest import CONTEXT, IMAGE_SIZE, StubBackend


def test_pages(client: TestClient) -> None:
    assert [m["id"] for m in client.get("/v1/models").json()["data"]] == ["tiny"]
    assert client.get("/v1/models/tiny").json()["object"] == "model"
    health = client.get("/health").json()
    assert (health["status"], health["context"], health["image_size"]) == ("ok", CONTEXT, IMAGE_SIZE)
    page = client.get("/")
    assert page.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert "<script src" not in page.text
    assert "http://" not in page.text
    assert "https://" not in page.text


def test_a_server_lives_and_says_why_it_is_not_ready(settings: ServeSettings) -> None:
    backend = StubBackend()
    backend.healthy = False
    with TestClient(create_app(backend, settings)) as client:
        live, ready = client.get("/health"), client.get("/ready")
    assert (live.status_code, live.json()["status"]) == (200, "ok")
    assert (ready.status_code, ready.json()) == (503, {"ready": False, "unavailable": {"tiny": "no replica"}})


class Patient(StubBackend):
    """Tells its facts as often as it is let."""

    def __init__(self) -> None:
        super().__init__()
        self.asked, self.told = 0, threading.Semaphore(0)

    async def describe(self) -> dict[str, Any]:
        self.asked += 1
        if not await asyncio.to_thread(self.told.acquire, timeout=60):
            raise AssertionError("nobody let it tell")
        return await super().describe()


def test_probes_are_answered_while_a_model_tells_nothing(
    settings: ServeSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(facts, "REFRESH_SECONDS", 0.0)
    monkeypatch.setattr(facts, "RETRY_SECONDS", 0.0)
    backend = Patient()
    with TestClient(create_app(backend, settings)) as client:
        try:
            until(lambda: backend.asked == 1)
            assert "context" not in client.get("/health").json()
            assert client.get("/ready").json()["unavailable"] == {"tiny": "it has not told yet"}
            backend.told.release()
            until(lambda: backend.asked == 2)
            assert client.get("/health").json()["context"] == CONTEXT, "what it told last"
            assert client.get("/ready").status_code == 200
            monkeypatch.setattr(facts, "ANSWER_SECONDS", 0.01)
            backend.told.release()  # the next question has so long
            until(lambda: client.get("/ready").status_code == 503)
            assert client.get("/ready").json()["unavailable"] == {"tiny": "no answer in 0.01 s"}
            assert client.get("/health").json()["context"] == CONTEXT
        finally:  # before the application ends, which waits for its threads
            backend.told.release(10_000)


def until(found: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not found():
        assert time.monotonic() < end
