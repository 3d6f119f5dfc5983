"""Chat over a real engine with a tiny random model: answers, streams, usage."""

from __future__ import annotations

import itertools
from typing import Any

from starlette.testclient import TestClient

from ...conftest import IMAGE_SIZE
from ..conftest import CHAT, IMAGE_TOKENS, ask, sse_events
from .conftest import picture


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
    *chunks, last = sse_events(response.text)
    parts: list[dict[str, Any]] = []
    for delta in (chunk["choices"][0]["delta"] for chunk in chunks):
        if delta.get("content"):
            if not parts or parts[-1]["type"] != "text":
                parts.append({"type": "text", "text": ""})
            parts[-1]["text"] += delta["content"]
        for image in delta.get("images", []):
            assert image.pop("index") == sum(part["type"] == "image_url" for part in parts)
            parts.append(image)
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert parts == whole["choices"][0]["message"]["parts"]
    assert [c["choices"][0]["finish_reason"] for c in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1]["choices"][0]["finish_reason"] == whole["choices"][0]["finish_reason"]
    assert (last["choices"], last["usage"]) == ([], whole["usage"])
    assert len({chunk["id"] for chunk in [*chunks, last]}) == 1


def test_a_stream_tells_progress_and_usage_only_when_asked(client: TestClient) -> None:
    body = ask(modalities=["image"], stream=True)
    plain = sse_events(client.post(CHAT, json=body).text)
    assert not any("drawing" in c["choices"][0]["delta"] or "usage" in c for c in plain)
    told = sse_events(client.post(CHAT, json=body | {"stream_options": {"include_progress": True}}).text)
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
