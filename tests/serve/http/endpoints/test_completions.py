"""Completions and the tokenizer over a real engine with a tiny random model."""

from __future__ import annotations

from starlette.testclient import TestClient

from ..conftest import sse_events


def test_completions(client: TestClient) -> None:
    body = {"prompt": "Count from two", "max_tokens": 6, "seed": 4}
    whole = client.post("/v1/completions", json=body).json()
    assert whole["object"] == "text_completion"
    assert whole["usage"]["prompt_tokens_details"]["image_tokens"] == 0
    chunks = sse_events(client.post("/v1/completions", json=body | {"stream": True}).text)
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == whole["choices"][0]["text"]
    assert chunks[-1]["choices"][0]["finish_reason"] == whole["choices"][0]["finish_reason"]


def test_ids_that_the_model_does_not_have_are_no_text(client: TestClient) -> None:
    tokens = client.post("/tokenize", json={"prompt": "seven", "add_special_tokens": False}).json()["tokens"]
    assert client.post("/detokenize", json={"tokens": tokens}).json() == {"prompt": "seven"}
    reply = client.post("/detokenize", json={"tokens": [*tokens, 10**6]})
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "tokens")
