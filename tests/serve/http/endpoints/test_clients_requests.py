"""Requests in the shapes that clients are known to send, over a real engine."""

from __future__ import annotations

import json
from typing import Any

import pytest
from starlette.testclient import TestClient

from ..conftest import CHAT, ask, error_of

COMPLETIONS, IMAGES = "/v1/completions", "/v1/images/generations"
DRAW, WHICH = {"role": "user", "content": "Draw a seven."}, {"role": "user", "content": "Which digit is this?"}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, {"messages": [DRAW, {"role": "assistant", "content": ""}, WHICH]}),
        (CHAT, {"messages": [DRAW, {"role": "assistant", "content": None}, WHICH]}),
        (CHAT, {"messages": [{"role": "system", "content": ""}, WHICH]}),
        (CHAT, {"messages": [{"role": "assistant", "content": "How can I help?"}, WHICH]}),
        (CHAT, ask(n=None, stream=None, logprobs=None, modalities=None)),
        (CHAT, ask(stream_options=None, stop="", tools=[], tool_choice="auto", response_format={"type": "text"})),
        (CHAT, ask(n=2)),
        (CHAT, ask(seed=9223372036854775807, n=2)),
        (CHAT, ask(seed=2**64 - 1, n=2)),
        (CHAT, ask(seed=-(2**63), n=2)),
        (CHAT, ask(seed=-1)),
        (CHAT, ask(seed=None)),
        (COMPLETIONS, {"prompt": "The", "n": None, "stream": None, "echo": None}),
        (COMPLETIONS, {"prompt": "The", "n": 2, "best_of": 2, "suffix": None, "logit_bias": None}),
        (COMPLETIONS, {"prompt": ["The", "A"], "seed": -1, "n": 2}),
    ],
)
def test_it_is_answered(client: TestClient, path: str, body: dict[str, Any]) -> None:
    for length in {"max_tokens": 6}, {"max_tokens": 6, "stream": True}:
        response = client.post(path, json=length | body if "stream" in body else body | length)
        assert response.status_code == 200, response.text
        assert '"error"' not in response.text
        assert "warning" not in response.headers


def test_max_tokens_of_null_is_no_limit(client: TestClient) -> None:
    body = ask(seed=3, temperature=1.5, top_p=1.0, modalities=["text"])
    assert (
        client.post(CHAT, json=body | {"max_tokens": None, "max_completion_tokens": None}).json()["choices"]
        == client.post(CHAT, json=body).json()["choices"]
    )


@pytest.mark.parametrize("seed", [5, 2**64 - 1, -5])
def test_a_seed_signed_or_not_is_the_same_and_of_several_the_next(client: TestClient, seed: int) -> None:
    free = {"temperature": 1.5, "top_p": 1.0, "modalities": ["text"], "max_tokens": 12}
    first, second = client.post(CHAT, json=ask(seed=seed, n=2, **free)).json()["choices"]
    for asked, choice in ((seed % 2**64, first), ((seed + 1) % 2**64, second)):
        alone = client.post(CHAT, json=ask(seed=asked, **free)).json()["choices"][0]
        assert alone["message"] == choice["message"]


def test_an_image_answer_may_be_drawn_with_a_seed_of_minus_one(client: TestClient) -> None:
    body = {"prompt": "a seven", "n": 2, "response_format": "b64_json", "seed": -1, "quality": None, "user": None}
    first, second = client.post(IMAGES, json=body).json()["data"]
    assert first != second


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, IMAGES])
def test_fields_that_nobody_knows_are_told_in_a_header(client: TestClient, path: str, stream: bool) -> None:
    body = ask(max_tokens=2) | {"prompt": "x", "temprature": 0, "stream": stream}
    response = client.post(path, json=body if path != IMAGES else {"prompt": "x", "temprature": 0, "stream": stream})
    assert response.status_code == 200
    assert "temprature" in response.headers["warning"]


@pytest.mark.parametrize(
    "tokens", [[2**31], [2**31 - 1], [320], [5, 320], [-1], [2**64], [10**30], [1.5], ["a"], [None], None]
)
def test_detokenize_beyond_the_vocabulary(client: TestClient, tokens: Any) -> None:
    response = client.post("/detokenize", json={"tokens": tokens})
    assert response.status_code == 400
    assert error_of(response)["param"].startswith("tokens")


def test_detokenize_within_the_vocabulary(client: TestClient) -> None:
    for token in (0, 319):
        assert client.post("/detokenize", json={"tokens": [token]}).status_code == 200
    ids = client.post("/tokenize", json={"prompt": "Which digit", "add_special_tokens": None}).json()["tokens"]
    assert client.post("/detokenize", json={"tokens": ids, "model": None}).json() == {"prompt": "Which digit"}
    assert client.post("/detokenize", json={"tokens": []}).json() == {"prompt": ""}


@pytest.mark.parametrize("field", ["stop_token_ids", "allowed_token_ids", "logit_bias"])
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_ids_beyond_the_vocabulary_are_refused(client: TestClient, path: str, field: str) -> None:
    value = {"320": 1} if field == "logit_bias" else [320]
    response = client.post(path, content=json.dumps(ask(max_tokens=2) | {"prompt": "x", field: value}),
                           headers={"content-type": "application/json"})  # fmt: skip
    assert response.status_code == 400
    assert "must lie in 0..319" in error_of(response)["message"]
