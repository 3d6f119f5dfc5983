"""Any OpenAI-compatible API as a system: chat with pictures in and out, completions, log-probabilities by `echo`.

While the endpoint is away the run pauses: requests are sent again until one is answered or the patience is over.
"""

from __future__ import annotations

import base64
import binascii
import json
import os
import re
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self, TypeVar

from calumma.model.document import Document, Image, Role, Segment, Text, Turn
from calumma.platform.evaluation.systems.prompts import (
    Answer,
    NoScores,
    NoSuchPath,
    Progress,
    Prompt,
    Score,
    SystemAway,
    Told,
    UnusableSystem,
)
from calumma.platform.evaluation.systems.specification import SystemSpecification
from calumma.platform.evaluation.systems.worker import cut_at_stops

T = TypeVar("T")
AWAY = (408, 409, 425, 429, 500, 502, 503, 504)  # worth another try
UNUSABLE = (401, 403, 404, 405)  # no other prompt will fare better
# What a server that does not take it is asked without.
OPTIONAL = {
    "seed", "top_p", "response_format", "modalities", "image_temperature", "image_top_p", "guidance_text",
    "guidance_image",
}  # fmt: skip
BROKEN = 4  # answers of 500 to one request, while others are answered: the request is why
LONGEST_PAUSE = 30.0
WORDS = 300  # of an error that are told


class RefusedPrompt(ValueError):
    """The endpoint does not answer this prompt; the message is its own."""


class EndpointSystem:
    """Requests to an endpoint, `concurrency` at once."""

    def __init__(self, spec: SystemSpecification, told: Told | None = None) -> None:
        import requests
        from requests.adapters import HTTPAdapter

        assert spec.url is not None
        self._spec, self._url, self._told = spec, spec.url.rstrip("/"), told
        self._session = requests.Session()
        for scheme in ("http://", "https://"):
            self._session.mount(scheme, HTTPAdapter(pool_maxsize=spec.concurrency))
        if spec.api_key:
            key = os.environ.get(spec.api_key)
            if not key:
                raise UnusableSystem(
                    f"{spec.url}: its key is to be in the environment variable {spec.api_key}, which is not set"
                )
            self._session.headers["Authorization"] = f"Bearer {key}"
        self._closed = threading.Event()
        self._tokenizes: bool | None = None
        self._untaken: set[str] = set()  # optional fields that it refuses
        self._model = spec.served_model or self._first_model()
        self.name = spec.name or self._model

    def close(self) -> None:
        self._closed.set()
        self._session.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def answer(self, prompts: Sequence[Prompt], progress: Progress | None = None) -> list[Answer]:
        return self._each(self._answer, prompts, progress)

    def score(self, pairs: Sequence[tuple[str, str]], progress: Progress | None = None) -> list[Score]:
        return self._each(self._score, pairs, progress)

    def score_whole(self, texts: Sequence[str], progress: Progress | None = None) -> list[Score]:
        return self._each(lambda text: self._score(("", text)), texts, progress)

    def _each(self, function: Callable[[Any], T], items: Sequence[Any], progress: Progress | None) -> list[T]:
        results: list[T] = []
        with ThreadPoolExecutor(self._spec.concurrency) as pool:
            try:
                for result in pool.map(function, items):
                    results.append(result)
                    if progress is not None:
                        progress(len(results), len(items))
            except BaseException:
                self._closed.set()  # those that wait for the endpoint wait no longer
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        return results

    # -- answers

    def _answer(self, prompt: Prompt) -> Answer:
        begin = time.monotonic()
        try:
            answer = self._drawn(prompt) if self._draws_apart(prompt) else self._chat(prompt)
        except RefusedPrompt as error:
            return Answer(Document(()), seconds=time.monotonic() - begin, finish="failed", error=str(error))
        document, usage, finish = answer
        if prompt.sampling.stop:
            document = cut_at_stops(document, prompt.sampling.stop)  # some servers take four, some leave them in
        details = usage.get("completion_tokens_details") or {}
        images = int(details.get("image_tokens") or 0)
        return Answer(
            document,
            int(usage.get("prompt_tokens") or 0),
            max(0, int(usage.get("completion_tokens") or 0) - images),
            images,
            time.monotonic() - begin,
            finish,
        )

    def _draws_apart(self, prompt: Prompt) -> bool:
        return prompt.sampling.mode == "image" and self._spec.images == "images"

    def _drawn(self, prompt: Prompt) -> tuple[Document, dict[str, Any], str]:
        reply = self._post(
            "/images/generations",
            {"model": self._model, "prompt": prompt.document.text.strip(), "n": 1, "response_format": "b64_json"},
        )
        pictures: list[Segment] = []
        for entry in reply.get("data") or []:
            if isinstance(entry, dict) and entry.get("b64_json"):
                pictures.append(Image(_decoded(entry["b64_json"]), role="assistant"))
        return Document(tuple(pictures)), reply.get("usage") or {}, "stop"

    def _chat(self, prompt: Prompt) -> tuple[Document, dict[str, Any], str]:
        sampling = prompt.sampling
        if not prompt.document.is_conversation and not prompt.document.images and sampling.mode == "text":
            return self._continued(prompt)
        body: dict[str, Any] = {
            "model": self._model,
            "messages": [_message(turn) for turn in prompt.document.turns()],
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "seed": sampling.seed % 2**31,
        }
        if sampling.mode == "text":
            body["max_tokens"] = sampling.max_tokens
            if sampling.stop:
                body["stop"] = list(sampling.stop)[:4]
        if sampling.mode != "text" and (pictures := self._spec.pictures) is not None:
            body |= {"image_temperature": pictures.temperature, "image_top_p": pictures.top_p}
            body |= {"guidance_text": pictures.guidance_text, "guidance_image": pictures.guidance_image}
        if self._spec.images != "none":
            body["modalities"] = {"text": ["text"], "image": ["image"], "interleaved": ["text", "image"]}[sampling.mode]
        elif sampling.mode == "image":
            raise RefusedPrompt("this endpoint draws nothing (`images: none`)")
        choice = self._first_choice(self._post("/chat/completions", body))
        message = choice.get("message") or {}
        return _document(message), choice["usage"], str(choice.get("finish_reason") or "stop")

    def _continued(self, prompt: Prompt) -> tuple[Document, dict[str, Any], str]:
        sampling = prompt.sampling
        body: dict[str, Any] = {
            "model": self._model,
            "prompt": prompt.document.text,
            "max_tokens": sampling.max_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "seed": sampling.seed % 2**31,
        }
        if sampling.stop:
            body["stop"] = list(sampling.stop)[:4]
        choice = self._first_choice(self._post("/completions", body))
        text = str(choice.get("text") or "")
        document = Document((Text(text),) if text else ())
        return document, choice["usage"], str(choice.get("finish_reason") or "stop")

    def _first_choice(self, reply: dict[str, Any]) -> dict[str, Any]:
        choices = reply.get("choices")
        if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
            raise UnusableSystem(f"{self._url}: the answer has no `choices`: {json.dumps(reply)[:WORDS]}")
        return {**choices[0], "usage": reply.get("usage") or {}}

    # -- log-probabilities

    def _score(self, pair: tuple[str, str]) -> Score:
        context, continuation = pair
        ids = self._token_ids(context + continuation)
        prompt: Any = context + continuation
        before = None
        if ids is not None:
            own = self._token_ids(context) if context else ids[:1]
            prompt, before = ids, len(own or ())
        body = {"model": self._model, "prompt": prompt, "max_tokens": 1, "temperature": 0, "echo": True, "logprobs": 1}
        try:
            choice = self._first_choice(self._post("/completions", body))
        except RefusedPrompt as error:
            raise NoScores(f"it scores no texts (/completions with echo and logprobs): {error}") from error
        logprobs = choice.get("logprobs") or {}
        values, tops = logprobs.get("token_logprobs"), logprobs.get("top_logprobs")
        if not isinstance(values, list) or not isinstance(tops, list):
            raise NoScores("it gives no log-probabilities of a prompt (/completions with echo and logprobs)")
        if before is None or ids is None:
            offsets = logprobs.get("text_offset") or []
            end = len(context) + len(continuation)
            numbers = [n for n, at in enumerate(offsets) if len(context) <= at < end and values[n] is not None]
        else:
            numbers = list(range(before, len(ids)))
        greedy = all(tops[n] and values[n] >= max(tops[n].values()) for n in numbers)
        asked = int(choice["usage"].get("prompt_tokens") or 0)
        return Score(sum(float(values[n]) for n in numbers), len(numbers), greedy, max(0, asked - len(numbers)))

    def _token_ids(self, text: str) -> list[int] | None:
        """By the endpoint's /tokenize, which vLLM has, too; None where there is none."""
        if self._tokenizes is False:
            return None
        root = self._url.removesuffix("/v1")
        try:
            reply = self._request(
                "POST", f"{root}/tokenize", {"model": self._model, "prompt": text, "add_special_tokens": True}
            )
        except SystemAway:
            raise
        except (UnusableSystem, RefusedPrompt):
            if self._tokenizes:
                raise
            self._tokenizes = False
            return None
        tokens = reply.get("tokens")
        if not isinstance(tokens, list) or not tokens or not all(isinstance(token, int) for token in tokens):
            self._tokenizes = False  # another server's path of this name: llama.cpp's wants `content`
            return None
        self._tokenizes = True
        return tokens

    # -- requests

    def _first_model(self) -> str:
        url = f"{self._url}/models"
        try:
            models = self._request("GET", url).get("data")
        except (NoSuchPath, RefusedPrompt) as error:
            raise UnusableSystem(
                f"{url} does not say which models there are ({error}); name one: `served_model`, --served-model"
            ) from error
        if not isinstance(models, list) or not models or not isinstance(models[0], dict):
            raise UnusableSystem(f"{url} names no model; name one: `served_model`, --served-model")
        return str(models[0].get("id"))

    def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """Without what the endpoint was seen to refuse of OpenAI's optional fields."""
        while True:
            sent = {name: value for name, value in body.items() if name not in self._untaken}
            try:
                return self._request("POST", self._url + path, sent)
            except RefusedPrompt as error:
                refused = {name for name in OPTIONAL & sent.keys() if re.search(rf"\b{name}\b", str(error))}
                if sent.get("modalities") != ["text"]:
                    refused.discard("modalities")
                if not refused:
                    raise
                self._untaken |= refused
                if self._told is not None:
                    self._told(f"{self._url} takes no {', '.join(sorted(refused))}: asked without")

    def _answers_others(self) -> bool:
        import requests

        body: dict[str, Any] = {
            "model": self._model,
            "messages": [{"role": "user", "content": "Hello"}],
            "max_tokens": 1,
        }
        try:
            return self._session.post(f"{self._url}/chat/completions", json=body, timeout=(10, self._spec.timeout)).ok
        except requests.RequestException:
            return False

    def _request(self, method: str, url: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """Raises RefusedPrompt, UnusableSystem, and SystemAway when the endpoint was away for too long."""
        import requests

        begin, pause, told, broken = time.monotonic(), 0.5, False, 0
        while True:
            problem, wait = "", 0.0
            try:
                response = self._session.request(method, url, json=body, timeout=(10, self._spec.timeout))
            except (requests.ConnectionError, requests.Timeout) as error:
                problem = f"{type(error).__name__}: {error}"
            except requests.RequestException as error:
                raise UnusableSystem(f"{url}: {error}") from error
            else:
                if response.ok:
                    return self._parsed(response.text, url)
                problem = f"{response.status_code}: {_complaint(response.text)}"
                if response.status_code in UNUSABLE:
                    kind = NoSuchPath if response.status_code in (404, 405) else UnusableSystem
                    raise kind(f"{url} answered {problem}")
                if response.status_code not in AWAY:
                    raise RefusedPrompt(problem)
                broken += response.status_code == 500
                if broken >= BROKEN and (body is None or self._answers_others()):
                    raise RefusedPrompt(f"{problem} ({broken} times)")
                wait = _seconds(response.headers.get("Retry-After"))
            if time.monotonic() - begin > self._spec.patience or self._closed.is_set():
                raise SystemAway(
                    f"{url} was away for {self._spec.patience:g} s ({problem[:WORDS]}). What it answered is kept; the "
                    "same command goes on when it is back"
                )
            if not told and self._told is not None:
                self._told(f"waiting for {url} ({problem[:WORDS]})")
            told = True
            self._closed.wait(max(wait, pause))
            pause = min(2 * pause, LONGEST_PAUSE)

    def _parsed(self, text: str, url: str) -> dict[str, Any]:
        try:
            value = json.loads(text)
        except ValueError:
            value = None
        if not isinstance(value, dict):
            raise UnusableSystem(f"{url}: is it an OpenAI-compatible API? It answered {text[:WORDS]!r}")
        return value


def _message(turn: Turn) -> dict[str, Any]:
    """A turn as OpenAI's message; plain documents are the user's."""
    parts: list[dict[str, Any]] = []
    for segment in turn.segments:
        if isinstance(segment, Text):
            parts.append({"type": "text", "text": segment.text})
        else:
            url = f"data:image/png;base64,{base64.b64encode(segment.png()).decode()}"
            parts.append({"type": "image_url", "image_url": {"url": url}})
    role = turn.role or "user"
    if len(parts) == 1 and parts[0]["type"] == "text":
        return {"role": role, "content": parts[0]["text"]}
    return {"role": role, "content": parts}


def _document(message: dict[str, Any]) -> Document:
    """An answer's text and pictures, in their order where it is told: `parts` as our servers have them, a list of
    parts as `content`, or a text and `images` beside it."""
    role: Role = "assistant"
    content = message.get("parts") or message.get("content") or message.get("refusal") or []
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else list(content)
    if not message.get("parts"):
        parts += message.get("images") or []
    segments: list[Segment] = []
    for part in parts:
        if part.get("type") in ("text", "output_text", "refusal"):
            if text := str(part.get("text") or part.get("refusal") or ""):
                segments.append(Text(text, role))
        elif part.get("type") == "image_url":
            url = part["image_url"]
            segments.append(Image(_data_of(url["url"] if isinstance(url, dict) else url), role=role))
    return Document(tuple(segments))


def _data_of(url: str) -> bytes:
    head, separator, encoded = url.partition(";base64,")
    if not head.startswith("data:") or not separator:
        raise RefusedPrompt(f"its picture is no data URL but {url[:60]!r}")
    return _decoded(encoded)


def _decoded(encoded: str) -> bytes:
    try:
        return base64.b64decode(encoded, validate=True)
    except (binascii.Error, ValueError) as error:
        raise RefusedPrompt(f"its picture is no base64: {error}") from error


def _complaint(text: str) -> str:
    """The message of an OpenAI error object, or what else was said."""
    try:
        error = json.loads(text)["error"]
        return str(error["message"] if isinstance(error, dict) else error)[:WORDS]
    except (ValueError, KeyError, TypeError):
        return text[:WORDS]


def _seconds(value: str | None) -> float:
    try:
        return min(max(0.0, float(value or 0)), 600.0)
    except ValueError:
        return 0.0
