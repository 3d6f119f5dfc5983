"""The three kinds of question, asked over HTTP of the served model: `POST /v1/chat/completions`."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel

from calumma.jobs.quickstart.conversations import (
    COUNTING,
    DRAWING,
    IMAGE_MARK,
    RECOGNITION,
    Shown,
    data_url,
    with_article,
)
from calumma.jobs.quickstart.digits import WORDS, Scan

MODALITIES = {"recognition": ["text"], "generation": ["image"], "edit": ["image"], "interleaved": ["text", "image"]}
TIMEOUT = 300  # seconds for one answer; starved machines are slow, not broken


class NoAnswer(RuntimeError):
    """The server did not answer a question as its wire format says."""


@dataclass(frozen=True)
class Question:
    kind: Literal["recognition", "generation", "edit", "interleaved"]
    text: str
    picture: Shown | None = None
    longest: int = 120  # tokens of an interleaved answer

    @property
    def modalities(self) -> list[str]:
        return MODALITIES[self.kind]

    def body(self, model: str, seed: int) -> dict[str, Any]:
        """The request's JSON: words are taken greedily, pictures sampled."""
        content: list[dict[str, Any]] = [{"type": "text", "text": self.text}]
        if self.picture is not None:
            content.append({"type": "image_url", "image_url": {"url": data_url(self.picture.png())}})
        return {
            "model": model,
            "messages": [{"role": "user", "content": content}],
            "modalities": self.modalities,
            "temperature": 0.0,
            "repetition_penalty": 1.0,
            "max_tokens": self.longest if self.kind == "interleaved" else 40,
            "seed": seed,
        }


class AnswerPart(BaseModel):
    """A piece of an answer: words, or a picture as a data URL."""

    kind: Literal["text", "image"]
    value: str

    def png(self) -> bytes:
        """The picture's bytes."""
        return base64.b64decode(self.value.partition(",")[2])


class Answer(BaseModel):
    """A question and what came back, in the order in which it came. `picture`: the question's, as a data URL."""

    kind: str
    question: str
    picture: str | None
    shows: str | None
    parts: list[AnswerPart]
    seconds: float


def questions(held_out: list[Scan]) -> list[Question]:
    """Three of each kind; the pictures are held-out scans."""
    chosen = [next(s for s in held_out if s.digit == digit) for digit in (7, 3, 8)]
    asked = [Question("recognition", RECOGNITION[0].replace(IMAGE_MARK, "").strip(), scan) for scan in chosen]
    asked += [
        Question("generation", DRAWING[0].format(a_digit=with_article(WORDS[d]), digit=WORDS[d])) for d in (7, 2, 5)
    ]
    asked += [
        Question("interleaved", COUNTING[0].format(first=WORDS[a], last=WORDS[b])) for a, b in ((2, 4), (0, 3), (5, 9))
    ]
    return asked


def ask(url: str, model: str, question: Question, seed: int) -> Answer:
    """One question over HTTP. Raises NoAnswer."""
    import time

    import requests

    begin = time.monotonic()
    try:
        response = requests.post(f"{url}/v1/chat/completions", json=question.body(model, seed), timeout=TIMEOUT)
    except requests.RequestException as error:
        raise NoAnswer(f"the server at {url} did not answer {question.text!r}: {error}") from error
    if response.status_code != 200:
        raise NoAnswer(
            f"the server at {url} refused {question.text!r} with {response.status_code}: {response.text[:500]}"
        )
    parts = [_answer_part(p) for p in response.json()["choices"][0]["message"]["parts"]]
    return Answer(
        kind=question.kind,
        question=question.text.strip(),
        picture=data_url(question.picture.png()) if question.picture else None,
        shows=question.picture.word if question.picture else None,
        parts=parts,
        seconds=round(time.monotonic() - begin, 3),
    )


def _answer_part(part: dict[str, Any]) -> AnswerPart:
    if part["type"] == "image_url":
        return AnswerPart(kind="image", value=part["image_url"]["url"])
    return AnswerPart(kind="text", value=part["text"])
