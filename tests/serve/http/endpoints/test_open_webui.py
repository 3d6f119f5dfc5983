"""What Open WebUI's server sends to one that speaks OpenAI's wire, in the shapes of its public source
(github.com/open-webui/open-webui: routers openai, tasks and images, utils misc and payload), over a real engine."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from typing import Any

import pytest
import requests

from ..conftest import sse_events
from .conftest import FREE, picture

WHICH = {"role": "user", "content": "Which digit is this?"}
TOOL = {
    "type": "function",
    "function": {
        "name": "draw_digit",
        "description": "Draws a digit.",
        "parameters": {"type": "object", "properties": {"value": {"enum": [1, 7]}}, "required": ["value"],
                       "additionalProperties": False},
    },
}  # fmt: skip
CALL = {
    "index": 0,
    "id": "call_1",
    "type": "function",
    "function": {"name": "draw_digit", "arguments": '{"value": 7}'},
}
# The settings of a model and of a chat, as its params become fields.
PARAMS = {"temperature": 0.8, "top_p": 0.9, "max_tokens": 8, "frequency_penalty": 0.5, "seed": 7, "stop": ["\n\n"]}


class WebUI:
    """With the headers that it sends, those with the user's name among them."""

    def __init__(self, url: str) -> None:
        self.url, self.session = f"{url}/v1", requests.Session()
        self.session.headers.update(
            {
                "Authorization": "Bearer none",
                "X-OpenWebUI-User-Name": "Anna",
                "X-OpenWebUI-User-Id": "6f1c",
                "X-OpenWebUI-User-Role": "admin",
                "X-OpenWebUI-Chat-Id": "local",
                "User-Agent": "Python/3.11 aiohttp/3.12",
            }
        )

    def post(self, path: str, **fields: Any) -> requests.Response:
        return self.session.post(self.url + path, timeout=300, **fields)


@pytest.fixture(scope="module")
def webui(roomy_url: str) -> Iterator[WebUI]:
    webui = WebUI(roomy_url)
    with webui.session:
        yield webui


def answered(reply: requests.Response) -> Any:
    assert reply.status_code == 200, reply.text
    assert "warning" not in reply.headers
    return reply.json()


def test_models_are_listed(webui: WebUI) -> None:
    found = answered(webui.session.get(f"{webui.url}/models", timeout=300))
    assert [model["id"] for model in found["data"]] == ["tiny"]


@pytest.mark.parametrize(
    "fields",
    [
        {},
        PARAMS,
        {"stream_options": {"include_usage": True}},
        {"presence_penalty": 0.0, "repeat_penalty": None, "reasoning_effort": None, "logit_bias": {"5": -100}},
        {"tools": [], "response_format": {"type": "text"}, "user": "6f1c"},
    ],
)
def test_a_chat_is_streamed(webui: WebUI, fields: dict[str, Any]) -> None:
    body = {"stream": True, "model": "tiny", "messages": [{"role": "system", "content": "Be brief."}, WHICH]}
    reply = webui.post("/chat/completions", json={"max_tokens": 8} | body | fields)
    assert reply.status_code == 200, reply.text
    assert reply.headers["content-type"].startswith("text/event-stream")
    events = sse_events(reply.text)
    assert any(event["choices"] and event["choices"][0]["finish_reason"] for event in events)
    if "stream_options" in fields:
        assert events[-1]["usage"]["total_tokens"] > 0


def test_pictures_in_a_chat_and_answers_that_were_pictures(webui: WebUI, data_url: str) -> None:
    shown = [{"type": "text", "text": ""}, {"type": "image_url", "image_url": {"url": data_url}}]
    messages = [{"role": "user", "content": shown}, {"role": "assistant", "content": ""}, WHICH]
    answered(webui.post("/chat/completions", json={"stream": False, "model": "tiny", "messages": messages} | PARAMS))


@pytest.mark.parametrize("content", ["drawn", [{"type": "text", "text": "drawn"}], "picture"])
def test_tools_are_called_and_their_results_sent_back(webui: WebUI, data_url: str, content: Any) -> None:
    """Its native mode: the stream's calls are put together by their index, then sent back with a `tool` message, whose
    content may hold pictures."""
    body: dict[str, Any] = {"stream": True, "model": "tiny", "messages": [WHICH], "tools": [TOOL], **FREE}
    reply = webui.post("/chat/completions", json=body | {"tool_choice": "required", "max_tokens": 200})
    calls: dict[int, dict[str, Any]] = {}
    for event in sse_events(reply.text):
        for delta in event["choices"][0]["delta"].get("tool_calls", ()):
            if delta["index"] not in calls:
                calls[delta["index"]] = delta
            else:
                calls[delta["index"]]["function"]["arguments"] += delta["function"]["arguments"]
    assert calls
    for call in calls.values():
        assert json.loads(call["function"]["arguments"])["value"] in (1, 7)
    if content == "picture":
        content = [{"type": "text", "text": "drawn"}, {"type": "image_url", "image_url": {"url": data_url}}]
    sent = list(calls.values())
    results = [{"role": "tool", "tool_call_id": call["id"], "content": content} for call in sent]
    history = [WHICH, {"role": "assistant", "content": "", "tool_calls": sent}, *results]
    again = webui.post("/chat/completions", json=body | {"messages": history, "max_tokens": 8})
    assert again.status_code == 200, again.text
    told = [WHICH, {"role": "assistant", "content": "", "tool_calls": [CALL]}]
    told.append({"role": "tool", "tool_call_id": "call_1", "content": content})
    answered(webui.post("/chat/completions", json=body | {"messages": told, "max_tokens": 8, "stream": False}))


@pytest.mark.parametrize("length", [{"max_completion_tokens": 1000}, {}, {"max_tokens": 1000}])
def test_titles_tags_and_queries(webui: WebUI, length: dict[str, int]) -> None:
    """One long question each, of which it reads the JSON in the answer's text."""
    task = '### Task:\nGive a title in JSON: { "title": "…" }\n<chat_history>\nUSER: Draw\n</chat_history>'
    body = {"model": "tiny", "messages": [{"role": "user", "content": task}], "stream": False, **length}
    message = answered(webui.post("/chat/completions", json=body))["choices"][0]["message"]
    assert isinstance(message["content"], str)
    form = {"type": "json_schema", "json_schema": {"name": "title", "schema": {
        "type": "object", "properties": {"title": {"type": "string", "maxLength": 20}}, "required": ["title"],
        "additionalProperties": False}}}  # fmt: skip
    message = answered(webui.post("/chat/completions", json=body | {"response_format": form}))["choices"][0]["message"]
    assert isinstance(json.loads(message["content"])["title"], str)


@pytest.mark.parametrize("fields", [{}, {"size": "auto"}, {"size": "8x8"}, {"response_format": "b64_json"}])
def test_an_image_is_drawn(webui: WebUI, fields: dict[str, Any]) -> None:
    body = {"model": "tiny", "prompt": "a seven", "n": 1, "response_format": "b64_json"} | fields
    [image] = answered(webui.post("/images/generations", json=body))["data"]
    assert image.get("url") is None, "it would fetch that"
    assert picture(image["b64_json"]).size == (8, 8)


@pytest.mark.parametrize("name", ["image", "image[]"])
def test_an_image_is_edited(webui: WebUI, png: bytes, name: str) -> None:
    files = [(name, ("image.png", png, "image/png"))] * (2 if name.endswith("]") else 1)
    data = {"model": "tiny", "prompt": "as a three", "n": "1", "response_format": "b64_json"}
    [image] = answered(webui.post("/images/edits", data=data, files=files))["data"]
    assert base64.b64decode(image["b64_json"])
