"""Requests that nobody has thought of: whatever is sent, the server never fails (no status of 500 and above).

`--fuzz 10000` sends so many; each is a function of its number, which a failure names.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from pydantic import BaseModel
from starlette.testclient import TestClient

from calumma.serve.http.app import create_app
from calumma.serve.http.wire.batches import BatchRequest
from calumma.serve.http.wire.requests import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    ImageRequest,
    TokenizeRequest,
)
from calumma.serve.http.wire.responses_api import ResponsesRequest
from calumma.serve.http.wire.support import UNSUPPORTED_FIELDS, WITHOUT_EFFECT
from calumma.serve.replica.replica import EngineReplica
from calumma.serve.settings import Batches, ServeSettings

ENDPOINTS: dict[str, type[BaseModel]] = {
    "/v1/chat/completions": ChatRequest,
    "/v1/completions": CompletionRequest,
    "/v1/images/generations": ImageRequest,
    "/v1/responses": ResponsesRequest,
    "/v1/batches": BatchRequest,
    "/tokenize": TokenizeRequest,
    "/detokenize": DetokenizeRequest,
}
DATA_URL = (
    "data:image/png;base64,"
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)
TEXTS = ["", " ", "x", "Draw a three.", "é" * 30, "\ud800", "\x00", "</s>", "<image>", "𝔘𝔫𝔦", "a" * 500, "[0-9]+", "{"]
NUMBERS = [0, 1, 2, 3, 5, -1, -2, 0.5, 1.5, 1e308, float("nan"), float("inf"), 2**31, 2**63, 2**64, 10**40, True, False]
NAMES = ["f", "g", "two words", "", "x" * 65, "<tool_call>"]
FILE = "file-of-the-test"  # stands for one that is there
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}


class Fuzzer:
    def __init__(self, number: int) -> None:
        self._random = random.Random(number)

    def request(self) -> tuple[str, dict[str, Any]]:
        return self._body(*self._random.choice(list(ENDPOINTS.items())))

    def other(self) -> tuple[str, str, dict[str, Any]]:
        """A method, a path, and what goes with it, of files and batches."""
        pick = self._random.choice
        text = quote(self._text().replace("\ud800", "é"), safe="")
        id = pick([FILE, "batch_" + "0" * 32, "..", "%2e%2e%2fx", "a b", text, "x" * 300])
        query = {pick(["limit", "after", "order", "purpose", "x"]): pick([0, 1, "desc", "asc", "batch", FILE, "é", -1])}
        data = {pick(["purpose"] * 3 + ["expires_after[seconds]", "file", "é"]): pick(["batch", "1", ""])}
        content = (pick(["a", "é\x00", ""]), b"{}" * pick([0, 9]))
        form = {"data": data, "files": {pick(["file", "file", "image"]): content}}
        broken = {"content": b"--x", "headers": {"content-type": "multipart/form-data; boundary=x"}}
        return pick(
            [
                ("GET", pick(["/v1/files", "/v1/batches"]), {"params": query}),
                ("GET", pick([f"/v1/files/{id}", f"/v1/files/{id}/content", f"/v1/batches/{id}"]), {}),
                ("POST", f"/v1/batches/{id}/cancel", {}),
                ("DELETE", f"/v1/files/x{id}", {}),
                ("POST", "/v1/files", form),
                ("POST", "/v1/files", broken),
            ]
        )

    def _body(self, path: str, model: type[BaseModel]) -> tuple[str, dict[str, Any]]:
        names = [
            *model.model_fields,
            *self._random.sample([*UNSUPPORTED_FIELDS, *sorted(WITHOUT_EFFECT), "\ud800", "unknown"], 2),
        ]
        body = {
            name: self._value(name)
            for name in self._random.sample(names, min(len(names), self._random.choice([0, 1, 1, 2, 3, 5])))
        }
        for name in ("messages", "prompt", "input", "tokens", "input_file_id", "endpoint", "completion_window"):
            if name in model.model_fields and self._random.random() < 0.9:
                body[name] = self._value(name) if self._random.random() < 0.2 else self._likely(name)
        for name in ("max_tokens", "max_output_tokens"):  # else an answer takes seconds
            if name in model.model_fields:
                body[name] = self._random.choice([1, 2, 3, 3, 3, 0, None, "2", -1]) if body.get("n") else 3
        return path, body

    def _value(self, name: str) -> Any:
        return self._likely(name) if self._random.random() < 0.8 else self._any()

    def _likely(self, name: str) -> Any:
        """A value in or near the range of the field."""
        pick, text, number = self._random.choice, self._text, self._number
        match name:
            case "n" | "best_of":
                return pick([1, 2, 3, 7, 128, 129, 10**9, 0, -1, "3", 2.0, 1.5, True])
            case "messages":
                return [self._message() for _ in range(self._random.randint(1, 4))]
            case "input":
                return pick([text(), [self._item() for _ in range(self._random.randint(1, 3))]])
            case "prompt":
                ids = [self._random.randint(-1, 330) for _ in range(4)]
                return pick([text(), "The", ["a", text()], ids, [ids, [5]], [5, 6], [[5], [6, 7]], []])
            case "tokens" | "stop_token_ids" | "allowed_token_ids":
                return [self._random.choice([3, 5, 319, 320, 2**31]) for _ in range(self._random.randint(0, 3))]
            case "logit_bias":
                return {str(pick([3, 5, 319, 320, "x", -1])): pick([1, -100, 100, 101, float("nan")])}
            case "stop" | "bad_words" | "guided_choice":
                return pick([text(), [text(), text()], [], ["a"] * 17])
            case "response_format":
                schema = {"name": "a", "schema": pick([SCHEMA, True, {"type": text()}])}
                return {"type": pick(["text", "json_object", "json_schema"]), "json_schema": schema}
            case "guided_json" | "json_schema":
                return pick([SCHEMA, json.dumps(SCHEMA), {"$ref": "#"}])
            case "structured_outputs":
                return {pick(["json", "regex", "choice", "grammar"]): pick([SCHEMA, text(), [text()]])}
            case "text":
                return {
                    "format": {"type": pick(["text", "json_object", "json_schema"]), "schema": SCHEMA, "name": text()}
                }
            case "modalities":
                return pick([["text"], ["image"], ["text", "image"], ["image", "image"], []])
            case "stream_options":
                return {"include_usage": pick([True, None]), "partial_images": pick([0, 1, 8, 9])}
            case "stream" | "echo" | "logprobs" | "ignore_eos":
                return pick([True, False, 1, None])
            case "tools":
                return [self._tool() for _ in range(self._random.randint(1, 3))]
            case "tool_choice":
                named = pick([{"function": {"name": "f"}}, {"name": "f"}, {"name": "h"}, {}])
                return pick(["none", "auto", "required", {"type": pick(["function", "image_generation"])} | named])
            case "input_file_id":
                return pick([FILE, FILE, text()])
            case "endpoint":
                return pick(["/v1/chat/completions", "/v1/responses", text()])
            case "completion_window":
                return pick(["24h", "24h", "1h"])
            case "model":
                return pick(["tiny", text(), None])
            case "begin_with":
                return "image"
            case "size":
                return pick(["auto", "8x8", "1024x1024", "0x0"])
            case "response_form" | "output_format":
                return pick(["png", "jpeg", "webp", "gif"])
            case "metadata":
                return {text(): pick([text(), number()])}
        return number()

    def _message(self) -> Any:
        role = self._random.choice(["system", "developer", "user", "user", "user", "assistant", "assistant", "tool"])
        message = {
            "role": role,
            "content": self._random.choice([self._text(), None, [self._part()], [self._part()] * 2]),
        }
        if role == "tool":
            return message | {"tool_call_id": self._random.choice(["1", "1", self._text(), None])}
        if role == "assistant" and self._random.random() < 0.5:
            arguments = self._random.choice(["{}", '{"a": 1}', "{", self._text(), None, {}])
            called = {"id": "1", "type": "function", "function": {"name": self._text(), "arguments": arguments}}
            return message | {"tool_calls": [called]}
        return message | (
            {self._random.choice(["parts", "images", "name"]): [self._part()]} if role == "assistant" else {}
        )

    def _tool(self) -> Any:
        pick = self._random.choice
        schema = pick([SCHEMA, {}, {"type": "string"}, {"$ref": "#"}, {"type": self._text()}, self._any(), None])
        function = {
            "name": pick([*NAMES[:2] * 3, *NAMES]),
            "description": pick([self._text(), None]),
            "parameters": schema,
            "strict": pick([True, False, None]),
        }
        flat = {"type": "function", **function}
        other = {"type": pick(["image_generation", self._text()])}
        return pick([{"type": "function", "function": function}, flat, other])

    def _item(self) -> Any:
        part = self._random.choice(
            [{"type": "input_text", "text": self._text()}, {"type": "input_image", "image_url": DATA_URL}]
        )
        call = {"type": "image_generation_call", "result": self._random.choice([DATA_URL.partition(",")[2], "x", None])}
        called = {"type": "function_call", "call_id": "1", "name": "f", "arguments": self._text()}
        result = {"type": "function_call_output", "call_id": "1", "output": self._random.choice([self._text(), [part]])}
        return self._random.choice(
            [{"role": "user", "content": self._text()}, {"role": "user", "content": [part]}, call, called, result]
        )

    def _part(self) -> Any:
        image = {"type": "image_url", "image_url": self._random.choice([DATA_URL, {"url": DATA_URL}, "x", {}, None])}
        return self._random.choice([{"type": "text", "text": self._text()}, image, {"type": self._text()}, None])

    def _text(self) -> str:
        return self._random.choice(TEXTS)

    def _number(self) -> Any:
        return self._random.choice(NUMBERS)

    def _any(self, depth: int = 0) -> Any:
        leaves = [self._text(), self._number(), None]
        if depth < 3:
            leaves += [[self._any(depth + 1)], {self._text(): self._any(depth + 1)}]
        return self._random.choice(leaves)


def test_no_request_makes_the_server_fail(
    roomy_replica: EngineReplica, settings: ServeSettings, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    seen: dict[int, int] = {}  # of what the model answers; files and batches are refused far more often
    called = 0
    settings = settings.model_copy(update={"batches": Batches(location=str(tmp_path / "batches"))})
    with TestClient(create_app(roomy_replica, settings), raise_server_exceptions=False) as client:
        form = {"data": {"purpose": "batch"}, "files": {"file": ("a", b"{}")}}
        file = client.post("/v1/files", **form).json()["id"]
        for number in range(request.config.getoption("--fuzz")):
            if number % 10 == 9:
                method, path, more = Fuzzer(number).other()
                response = client.request(method, path.replace(FILE, file), **more)
                told = f"number {number}: {method} {path} {more}\n{response.text[:500]}"
            else:
                path, body = Fuzzer(number).request()
                sent = json.dumps(body).replace(FILE, file)
                response = client.post(path, content=sent, headers={"content-type": "application/json"})
                told = f"number {number}: {path} {body}\n{response.text[:500]}"
            if path in ENDPOINTS and path != "/v1/batches":
                seen[response.status_code] = seen.get(response.status_code, 0) + 1
            called += "call_" in response.text
            assert response.status_code < 500, told
            assert '"type":"server_error"' not in response.text, told
            if response.status_code != 200:
                assert set(response.json()["error"]) == {"message", "type", "param", "code"}, told
        assert client.post("/v1/completions", json={"prompt": "x", "max_tokens": 1}).status_code == 200
    print(seen, called)
    assert seen[200] > sum(seen.values()) / 10, "too few of them are answered to try much"
