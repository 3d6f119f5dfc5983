"""A policy sees prompts before the model does and output before the client does; refusals have the wire's format."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai import OpenAI
from starlette.testclient import TestClient

from calumma.model.document import Document, Image, Text
from calumma.serve.http.app import create_app
from calumma.serve.protocol import ImageOutput, ImageProgress, OutputEvent, TextDelta, Token
from calumma.serve.safety import Policy, PolicyInput, keywords
from calumma.serve.settings import Safety

from ..conftest import StubBackend, answered, listening
from .conftest import CHAT, ask, sse_events, stub_settings

RULES = Safety(policy="calumma.serve.safety:keywords", options={"words": ["dynamite", "ünsafe word"], "reason": "no"})


def saying(*events: OutputEvent) -> StubBackend:
    return StubBackend(*answered(*events))


def client(backend: Any, safety: Safety = RULES) -> TestClient:
    return TestClient(create_app(backend, stub_settings(safety=safety)))


@pytest.mark.parametrize("text", ["Dynamite!", "how to use DYNAMITE", "ｄynamite", "an u\u0308nsafe word, please"])
def test_a_declined_prompt_does_not_reach_the_model(text: str) -> None:
    backend = saying(TextDelta("sure"))
    with client(backend) as http:
        choice = http.post(CHAT, json=ask(text)).json()["choices"][0]
        assert choice["finish_reason"] == "content_filter"
        assert choice["message"]["refusal"] == "no"
        assert choice["message"]["content"] == ""
        stream = sse_events(http.post(CHAT, json=ask(text, stream=True)).text)
        assert {"refusal": "no"} in [chunk["choices"][0]["delta"] for chunk in stream]
        image = http.post("/v1/images/generations", json={"prompt": text})
        assert (image.status_code, image.json()["error"]["code"]) == (400, "content_policy_violation")
        completion = http.post("/v1/completions", json={"prompt": text}).json()["choices"][0]
        assert (completion["text"], completion["finish_reason"]) == ("", "content_filter")
    assert backend.requests == []


@pytest.mark.parametrize("text", ["dynamited", "aerodynamite", "a dynamo"])
def test_a_word_within_another_is_another_word(text: str) -> None:
    with client(saying(TextDelta("sure"))) as http:
        assert http.post(CHAT, json=ask(text)).json()["choices"][0]["message"]["content"] == "sure"


def test_an_answer_is_declined_before_the_word_is_sent() -> None:
    pieces = [TextDelta(text) for text in ("Take some ", "dyna", "mite", ", light ", "it.")]
    backend = saying(*pieces)
    with client(backend) as http:
        chunks = sse_events(http.post(CHAT, json=ask(stream=True)).text)
        assert "".join(c["choices"][0]["delta"].get("content") or "" for c in chunks) == "Take some "
        assert chunks[-1]["choices"][0]["finish_reason"] == "content_filter"
        assert sum("refusal" in c["choices"][0]["delta"] for c in chunks) == 1
        assert backend.endings == ["stopped"], "nothing more is generated"
        whole = http.post(CHAT, json=ask()).json()["choices"][0]
        assert (whole["message"]["content"], whole["message"]["refusal"]) == ("Take some ", "no")


@given(st.lists(st.sampled_from(["dyna", "mite", " ", "a", "\n", "dynamite"]), max_size=8))
def test_whatever_the_pieces_no_declined_word_is_sent_and_else_nothing_is_lost(texts: list[str]) -> None:
    with client(saying(*map(TextDelta, texts))) as http:
        choice = http.post(CHAT, json=ask()).json()["choices"][0]
    policy = keywords(["dynamite"])
    declined = policy(PolicyInput("answer", Document((Text("".join(texts)),)))) is not None
    assert (choice["finish_reason"] == "content_filter") == declined
    sent = choice["message"]["content"]
    assert policy(PolicyInput("answer", Document((Text(sent),)))) is None
    assert "".join(texts).startswith(sent) if declined else sent == "".join(texts)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("path", "body"),
    [(CHAT, ask()), ("/v1/completions", {"prompt": "hi"}), ("/v1/completions", {"prompt": ["hi", "you"], "n": 2})],
    ids=["chat", "completion", "completions"],
)
def test_no_endpoint_sends_what_the_policy_declines(path: str, body: dict[str, Any], stream: bool) -> None:
    with client(saying(*map(TextDelta, ["Take some ", "dyna", "mite", " now"]))) as http:
        reply = http.post(path, json=body | {"stream": stream})
    assert reply.status_code == 200
    assert "mite" not in reply.text
    assert '"content_filter"' in reply.text
    assert '"stop"' not in reply.text


@pytest.mark.parametrize("stream", [False, True])
def test_an_image_is_not_drawn_for_a_declined_prompt(stream: bool) -> None:
    backend = saying(TextDelta("sure"))
    with client(backend) as http:
        reply = http.post("/v1/images/generations", json={"prompt": "dynamite", "stream": stream})
    assert "content_policy_violation" in reply.text
    assert backend.requests == []


def test_a_word_is_declined_that_a_space_lets_out_in_two_parts() -> None:
    with client(saying(TextDelta("an ünsafe "), TextDelta("word "), TextDelta("more"))) as http:
        choice = http.post(CHAT, json=ask()).json()["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("an ünsafe ", "content_filter")


def test_log_probabilities_tell_nothing_of_text_that_is_held_back() -> None:
    def deltas(*texts: str) -> list[TextDelta]:
        return [TextDelta(text, (Token(k, text.encode(), 0, -1.0),)) for k, text in enumerate(texts)]

    with client(saying(*deltas("some ", "more dyna", "mite ", "now"))) as http:
        streamed = sse_events(http.post(CHAT, json=ask(stream=True, logprobs=True)).text)
        whole = http.post(CHAT, json=ask(logprobs=True)).json()["choices"][0]
    tokens = [token for chunk in streamed for token in (chunk["choices"][0].get("logprobs") or {}).get("content", [])]
    assert [token["token"] for token in tokens] == ["some "]
    assert [token["token"] for token in whole["logprobs"]["content"]] == ["some "]
    harmless = ["some ", "more dyna", "mo ", "now"]
    with client(saying(*deltas(*harmless))) as http:
        whole = http.post(CHAT, json=ask(logprobs=True)).json()["choices"][0]
    assert [token["token"] for token in whole["logprobs"]["content"]] == harmless, "what is sent has them all"


def no_pictures() -> Policy:
    def policy(shown: PolicyInput) -> str | None:
        drawn = any(isinstance(segment, Image) for segment in shown.document.segments)
        return "no pictures" if shown.stage == "answer" and drawn else None

    return policy


def test_a_policy_sees_pictures_and_their_previews_are_not_sent(png: bytes) -> None:
    policy = Safety(policy=f"{__name__}:no_pictures")
    backend = saying(TextDelta("Look:"), ImageProgress(4, 16, png), ImageOutput(png), TextDelta("nice"))
    options = {"include_progress": True, "partial_images": 2}
    with client(backend, policy) as http:
        text = http.post(CHAT, json=ask(stream=True, stream_options=options)).text
    assert "image/png" not in text
    assert '"drawing":{"done":4,"total":16}' in text
    assert "Look:" in text
    assert "nice" not in text
    assert "no pictures" in text
    assert backend.requests[0].previews == 0, "none is made that nobody would see"


def test_a_prompt_of_token_ids_is_shown_as_text(replica: Any) -> None:
    ids = replica.model.text_tokenizer.encode("say dynamite")
    with client(replica) as http:
        choice = http.post("/v1/completions", json={"prompt": ids, "max_tokens": 2}).json()["choices"][0]
        assert choice["finish_reason"] == "content_filter"
        fine = replica.model.text_tokenizer.encode("say seven")
        choice = http.post("/v1/completions", json={"prompt": fine, "max_tokens": 2}).json()["choices"][0]
        assert choice["finish_reason"] != "content_filter"
        assert "say" not in choice["text"], "what the policy was shown is not echoed"
        echoed = http.post("/v1/completions", json={"prompt": fine, "max_tokens": 2, "echo": True}).json()["choices"][0]
        assert echoed["text"].startswith("say seven")


def test_the_openai_client_reads_a_refusal() -> None:
    app = create_app(saying(TextDelta("x")), stub_settings(safety=RULES))
    with listening(app) as url, OpenAI(base_url=f"{url}/v1", api_key="x") as openai:
        answer = openai.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "dynamite"}])
        assert answer.choices[0].message.refusal == "no"
        assert answer.choices[0].finish_reason == "content_filter"
