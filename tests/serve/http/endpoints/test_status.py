"""Models, health and the page."""

from __future__ import annotations

from starlette.testclient import TestClient

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


def test_health_says_why_it_is_bad(settings: ServeSettings) -> None:
    backend = StubBackend()
    backend.healthy = False
    with TestClient(create_app(backend, settings)) as client:
        response = client.get("/health")
    assert response.status_code == 503
    assert response.json() == {"status": "unavailable", "reason": "no replica"}
