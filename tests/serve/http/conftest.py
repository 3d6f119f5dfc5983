"""What the tests of the HTTP application share: requests, and how their replies are read."""

from __future__ import annotations

import json
from typing import Any

from starlette.testclient import TestClient

from calumma.serve.settings import ServeSettings

CHAT = "/v1/chat/completions"
IMAGE_TOKENS = 16 + 2


def ask(text: str = "Draw a three.", **fields: Any) -> dict[str, Any]:
    """The body of a chat with one message."""
    return {"messages": [{"role": "user", "content": text}], **fields}


def stub_settings(**fields: Any) -> ServeSettings:
    """Of a server over a `StubBackend`, under the name by which Starlette's client calls it, too."""
    return ServeSettings(**{"model": "/models/tiny", "name": "tiny", "allowed_hosts": ("testserver",)} | fields)


def sse_events(text: str) -> list[dict[str, Any]]:
    """The values of a whole stream's events, but for the last, which ends it."""
    lines = text.strip().split("\n\n")
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def error_of(response: Any) -> dict[str, Any]:
    """OpenAI's error object, the whole of the body."""
    body = response.json()
    assert set(body) == {"error"}
    error: dict[str, Any] = body["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


def metric(client: TestClient, line: str) -> float:
    """The value of one line of /metrics; 0 when it is not there yet."""
    found = [text for text in client.get("/metrics").text.splitlines() if text.startswith(line + " ")]
    return float(found[0].split()[-1]) if found else 0.0
