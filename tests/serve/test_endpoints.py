"""The HTTP application over a real engine with a tiny random model: answers, streams, errors, pages."""

from __future__ import annotations

import asyncio
import base64
import io
import itertools
import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
from PIL import Image as PILImage
from starlette.testclient import TestClient

from calumma.serve.http.app import create_app
from calumma.serve.protocol import RequestFailed, Started, TextDelta, TokenCount
from calumma.serve.settings import ServeSettings

from .conftest import CONTEXT, IMAGE_SIZE

CHAT = "/v1/chat/completions"
IMAGE_TOKENS = 16 + 2


def ask(text: str = "Draw a three.", **fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}], **fields}


def events(text: str) -> list[dict[str, Any]]:
    lines = text.strip().split("\n\n")
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def picture(url: str) -> PILImage.Image:
    head, data = url.split(",")
    assert head == "data:image/png;base64"
    return PILImage.open(io.BytesIO(base64.b64decode(data)), formats=["PNG"])


def error_of(response: Any) -> dict[str, Any]:
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    return body["error"]


def test_one_image(client: TestClient) -> None:
    answer = client.post(CHAT, json=ask(modalities=["image"], model="tiny")).json()
    message = answer["choices"][0]["message"]
    assert answer["object"] == "chat.completion"
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert message["content"] == ""
    assert message["parts"] == message["images"]
    assert picture(message["images"][0]["image_url"]["url"]).size == (IMAGE_SIZE, IMAGE_SIZE)
    assert answer["usage"]["completion_tokens"] == IMAGE_TOKENS
    assert answer["usage"]["completion_tokens_details"] == {"text_tokens": 0, "image_tokens": IMAGE_TOKENS}


def test_text_only_has_no_images(client: TestClient) -> None:
    answer = client.post(CHAT, json=ask(modalities=["text"], seed=1)).json()
    assert answer["choices"][0]["message"]["images"] == []
    assert answer["usage"]["completion_tokens_details"]["image_tokens"] == 0


def interleaved(client: TestClient, **fields: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The first seed whose answer holds text and at least one image, and its request."""
    for seed in range(60):
        body = ask(seed=seed, temperature=1.5, top_p=1.0, **fields)
        answer = client.post(CHAT, json=body).json()
        message = answer["choices"][0]["message"]
        if message["images"] and message["content"]:
            return answer, body
    raise AssertionError("no seed gave text and image")


def test_parts_are_the_order_of_text_and_images(client: TestClient) -> None:
    message = interleaved(client)[0]["choices"][0]["message"]
    assert "".join(p["text"] for p in message["parts"] if p["type"] == "text") == message["content"]
    assert [p for p in message["parts"] if p["type"] == "image_url"] == message["images"]
    kinds = [p["type"] for p in message["parts"]]
    assert all(a != "text" or b != "text" for a, b in itertools.pairwise(kinds))


def test_a_stream_brings_the_same_answer_as_a_whole_one(client: TestClient) -> None:
    whole, body = interleaved(client)
    response = client.post(CHAT, json=body | {"stream": True, "stream_options": {"include_usage": True}})
    assert response.headers["content-type"].startswith("text/event-stream")
    *chunks, last = events(response.text)
    parts: list[dict[str, Any]] = []
    for delta in (chunk["choices"][0]["delta"] for chunk in chunks):
        if delta.get("content"):
            if not parts or parts[-1]["type"] != "text":
                parts.append({"type": "text", "text": ""})
            parts[-1]["text"] += delta["content"]
        parts += delta.get("images", [])
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert parts == whole["choices"][0]["message"]["parts"]
    assert [c["choices"][0]["finish_reason"] for c in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1]["choices"][0]["finish_reason"] == whole["choices"][0]["finish_reason"]
    assert (last["choices"], last["usage"]) == ([], whole["usage"])
    assert len({chunk["id"] for chunk in [*chunks, last]}) == 1


def test_a_stream_tells_progress_and_usage_only_when_asked(client: TestClient) -> None:
    body = ask(modalities=["image"], stream=True)
    plain = events(client.post(CHAT, json=body).text)
    assert not any("drawing" in c["choices"][0]["delta"] or "usage" in c for c in plain)
    told = events(client.post(CHAT, json=body | {"stream_options": {"include_progress": True}}).text)
    steps = [c["choices"][0]["delta"]["drawing"] for c in told if "drawing" in c["choices"][0]["delta"]]
    assert steps
    assert {step["total"] for step in steps} == {16}
    assert [s["done"] for s in steps] == sorted(s["done"] for s in steps)


def test_an_image_in_the_prompt_is_counted(client: TestClient, data_url: str) -> None:
    content = [{"type": "text", "text": "Which digit is this?"}, {"type": "image_url", "image_url": {"url": data_url}}]
    body = {"messages": [{"role": "user", "content": content}], "modalities": ["text"], "max_tokens": 3}
    usage = client.post(CHAT, json=body).json()["usage"]
    assert usage["prompt_tokens_details"]["image_tokens"] == IMAGE_TOKENS
    assert usage["prompt_tokens"] == sum(usage["prompt_tokens_details"].values())
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


def test_an_answer_can_be_sent_back(client: TestClient) -> None:
    message = client.post(CHAT, json=ask(modalities=["image"])).json()["choices"][0]["message"]
    body = {"messages": [*ask()["messages"], message, {"role": "user", "content": "And a four."}], "max_tokens": 2}
    response = client.post(CHAT, json=body)
    assert response.status_code == 200
    assert response.json()["usage"]["prompt_tokens_details"]["image_tokens"] == IMAGE_TOKENS


def test_max_tokens_ends_an_answer(client: TestClient) -> None:
    ended = [client.post(CHAT, json=ask(modalities=["text"], max_tokens=2, seed=s)).json() for s in range(5)]
    assert all(answer["usage"]["completion_tokens"] <= 2 for answer in ended)
    assert "length" in {answer["choices"][0]["finish_reason"] for answer in ended}


def test_the_same_seed_gives_the_same_answer(client: TestClient) -> None:
    answers = [client.post(CHAT, json=ask(seed=11)).json()["choices"] for _ in range(2)]
    assert answers[0] == answers[1]


def test_completions(client: TestClient) -> None:
    body = {"prompt": "Count from two", "max_tokens": 6, "seed": 4}
    whole = client.post("/v1/completions", json=body).json()
    assert whole["object"] == "text_completion"
    assert whole["usage"]["prompt_tokens_details"]["image_tokens"] == 0
    chunks = events(client.post("/v1/completions", json=body | {"stream": True}).text)
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == whole["choices"][0]["text"]
    assert chunks[-1]["choices"][0]["finish_reason"] == whole["choices"][0]["finish_reason"]


def test_image_generations(client: TestClient) -> None:
    body = {"prompt": "Draw a three.", "n": 3, "response_format": "b64_json", "seed": 2}
    answer = client.post("/v1/images/generations", json=body).json()
    images = [base64.b64decode(item["b64_json"]) for item in answer["data"]]
    assert [PILImage.open(io.BytesIO(i), formats=["PNG"]).size for i in images] == [(IMAGE_SIZE, IMAGE_SIZE)] * 3
    assert len(set(images)) == 3, "each of several images has a seed of its own"
    assert answer["usage"]["completion_tokens"] == 3 * IMAGE_TOKENS
    first = client.post("/v1/images/generations", json=body | {"n": 1}).json()
    assert first["data"] == answer["data"][:1]


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


def metric(client: TestClient, line: str) -> float:
    """The value of one line of /metrics; 0 when it is not there yet."""
    found = [text for text in client.get("/metrics").text.splitlines() if text.startswith(line + " ")]
    return float(found[0].split()[-1]) if found else 0.0


def test_ids_that_the_model_does_not_have_are_no_text(client: TestClient) -> None:
    tokens = client.post("/tokenize", json={"prompt": "seven", "add_special_tokens": False}).json()["tokens"]
    assert client.post("/detokenize", json={"tokens": tokens}).json() == {"prompt": "seven"}
    reply = client.post("/detokenize", json={"tokens": [*tokens, 10**6]})
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "tokens")


def test_metrics_count_requests_and_tokens(client: TestClient) -> None:
    client.post(CHAT, json=ask(modalities=["image"]))
    client.post(CHAT, json=ask(model="other"))
    client.get("/nowhere/in/particular")
    assert metric(client, f'calumma_requests_total{{endpoint="{CHAT}",status="200"}}') == 1
    assert metric(client, f'calumma_requests_total{{endpoint="{CHAT}",status="404"}}') == 1
    assert metric(client, 'calumma_requests_total{endpoint="other",status="404"}') == 1
    assert metric(client, 'calumma_tokens_total{direction="answer",modality="image",model="tiny"}') == IMAGE_TOKENS
    assert metric(client, 'calumma_images_total{model="tiny"}') == 1
    assert metric(client, 'calumma_requests_running{model="tiny"}') == 0
    assert metric(client, f'calumma_request_seconds_count{{endpoint="{CHAT}"}}') == 2


@pytest.mark.parametrize(
    ("body", "status", "param", "says"),
    [
        (ask(model="gpt"), 404, "model", "this server has 'tiny'"),
        (ask("x" * 400), 400, "messages", f"402 tokens.*context of {CONTEXT}"),
        (ask("x" * (CONTEXT - 12), modalities=["image"]), 400, "messages", "18 of an image"),
        ({"messages": [{"role": "robot", "content": "x"}]}, 400, "messages[0].role", "robot"),
        (ask(modalities=["smell"]), 400, "modalities[0]", "'text' or 'image'"),
        (ask(temperature=3), 400, "temperature", "less than or equal to 2"),
        (ask(tools=[{}]), 400, "tools", "leave it out"),
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


def chunked(size: int) -> Iterator[bytes]:
    for _ in range(0, size, 10_000):
        yield b" " * 10_000


@pytest.mark.parametrize("content", [b" " * 300_000, "chunks"])
def test_a_body_above_the_limit(client: TestClient, content: Any) -> None:
    response = client.post(
        CHAT, content=chunked(300_000) if content == "chunks" else content, headers={"content-type": "application/json"}
    )
    error = error_of(response)
    assert (response.status_code, error["code"]) == (413, "request_too_large")
    assert "0.25 MiB" in error["message"]


def test_other_errors_have_the_same_form(client: TestClient) -> None:
    assert "the API is below /v1" in error_of(client.get("/v2"))["message"]
    wrong_method = client.get(CHAT)
    assert wrong_method.status_code == 405
    assert "does not take GET" in error_of(wrong_method)["message"]
    assert client.get("/v1/models/other").status_code == 404


class Breaking:
    """A backend whose replica is lost: before the answer, or in the middle of it."""

    def __init__(self, pieces: list[Any]) -> None:
        self.pieces = pieces

    async def generate(self, job: Any) -> Any:
        for piece in self.pieces:
            if isinstance(piece, Exception):
                raise piece
            yield piece

    async def describe(self) -> dict[str, Any]:
        raise RuntimeError("no replica")


LOST = RequestFailed(503, "the replica was lost", code="unavailable")


@pytest.mark.parametrize("stream", [False, True])
def test_a_lost_replica_is_a_503(settings: ServeSettings, stream: bool) -> None:
    with TestClient(create_app(Breaking([LOST]), settings)) as client:
        response = client.post(CHAT, json=ask(stream=stream))
    assert response.status_code == 503
    assert response.headers["retry-after"] == "5"
    assert error_of(response) == {
        "message": "the replica was lost", "type": "server_error", "param": None, "code": "unavailable"
    }  # fmt: skip


def test_a_replica_lost_half_way_ends_the_stream_with_an_error(settings: ServeSettings) -> None:
    with TestClient(create_app(Breaking([Started(TokenCount(3)), TextDelta("se"), LOST]), settings)) as client:
        *chunks, last = events(client.post(CHAT, json=ask(stream=True)).text)
        assert client.post(CHAT, json=ask()).status_code == 503
    assert chunks[-1]["choices"][0]["delta"] == {"content": "se"}
    assert last["error"]["message"] == "the replica was lost"


def test_health_says_why_it_is_bad(settings: ServeSettings) -> None:
    with TestClient(create_app(Breaking([]), settings)) as client:
        response = client.get("/health")
    assert response.status_code == 503
    assert response.json() == {"status": "unavailable", "reason": "no replica"}


def test_an_unforeseen_error_tells_no_secrets(settings: ServeSettings) -> None:
    backend = Breaking([RuntimeError("password=1234")])
    with TestClient(create_app(backend, settings), raise_server_exceptions=False) as client:
        response = client.post(CHAT, json=ask())
    assert response.status_code == 500
    assert "1234" not in response.text
    assert error_of(response)["type"] == "server_error"


def test_the_work_of_a_client_that_leaves_is_given_up(settings: ServeSettings) -> None:
    closed = []

    class Endless(Breaking):
        async def generate(self, job: Any) -> Any:
            try:
                yield Started(TokenCount(3))
                await asyncio.Event().wait()
            finally:
                closed.append(job.id)

    app = create_app(Endless([]), settings)

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
    assert len(closed) == 1
    with TestClient(app) as client:
        assert metric(client, 'calumma_requests_running{model="tiny"}') == 0
        assert metric(client, f'calumma_requests_total{{endpoint="{CHAT}",status="499"}}') == 1
