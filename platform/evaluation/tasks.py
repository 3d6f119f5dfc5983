"""What an evaluation asks and how an answer is graded. Pure functions of documents: no model, no cluster.

A case is a conversation whose last assistant turn is the expected answer and whose earlier turns are the prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Literal

from PIL import Image as PILImage

from calumma.model.document import Document, Image, Text
from calumma.platform.evaluation.judge import SEPARATOR, right_parts

Kind = Literal["recognition", "generation", "interleaved"]
Classifier = Callable[[Sequence[PILImage.Image]], list[str]]  # pictures -> the label each shows


class InvalidCase(ValueError):
    """An evaluation document without a question and an answer."""


@dataclass(frozen=True)
class Case:
    """`words`: what the answer should say, in order; with pictures, each is also the label of its picture. Of a label
    of several parts an interleaved answer says the first."""

    kind: Kind
    prompt: Document
    expected: Document
    words: tuple[str, ...]


@dataclass(frozen=True)
class Grade:
    """How one answer was judged. `right` decides the task's headline; words and digits are only of interleaved answers,
    parts (of a label, each) of drawings."""

    right: bool
    answer: str
    words: bool = False
    digits: tuple[bool, ...] = ()
    parts: tuple[bool, ...] = ()


def make_case(kind: Kind, document: Document) -> Case:
    """Split a conversation into prompt and expected answer. Raises InvalidCase."""
    turns = list(document.turns())
    if len(turns) < 2 or turns[-1].role != "assistant" or turns[-2].role != "user":
        roles = [turn.role for turn in turns]
        raise InvalidCase(f"an evaluation document must end with a user's and an assistant's turn, found turns {roles}")
    prompt = Document(tuple(s for turn in turns[:-1] for s in turn.segments))
    expected = Document(turns[-1].segments)
    words: tuple[str, ...] = (normalized_word(expected.text),)
    if kind != "recognition":
        words = tuple(image.caption or "" for image in expected.images)
        if not words or not all(words):
            raise InvalidCase(f"the expected answer of a {kind} case must hold images, each with a caption")
    return Case(kind, prompt, expected, words)


def normalized_word(text: str) -> str:
    """A word as it is compared: without surrounding space and punctuation, in lower case."""
    return text.strip().strip(".,:;!?\"'").strip().lower()


def grade(case: Case, answer: Document, classify: Classifier) -> Grade:
    """Judge one answer."""
    if case.kind == "recognition":
        word = normalized_word(answer.text)
        return Grade(word == case.words[0] and not answer.images, word)
    labels = tuple(classify([image.open() for image in answer.images]))
    if case.kind == "generation":
        right = len(labels) == 1 and labels[0] == case.words[0]
        parts = right_parts(labels[0], case.words[0]) if len(labels) == 1 else ()
        return Grade(right, " ".join(labels) or "no picture", parts=parts)
    return _grade_interleaved(case, answer, labels)


def _grade_interleaved(case: Case, answer: Document, labels: tuple[str, ...]) -> Grade:
    """Valid: word, picture, word, picture, … with as many pictures as asked for. Missing pictures count as wrong."""
    pieces = texts_and_images(answer)
    alternates = all(isinstance(p, Text) == (i % 2 == 0) for i, p in enumerate(pieces))
    valid = alternates and len(pieces) == 2 * len(case.words)
    words = tuple(normalized_word(p.text) for p in pieces if isinstance(p, Text))
    digits = tuple(i < len(labels) and labels[i] == word for i, word in enumerate(case.words))
    expected = tuple(label.split(SEPARATOR)[0].lower() for label in case.words)
    return Grade(valid, " ".join(words), words=words == expected, digits=digits)


def texts_and_images(answer: Document) -> list[Text | Image]:
    """The answer's texts and images in order; neighbouring texts joined, empty ones left out."""
    pieces: list[Text | Image] = []
    for segment in answer.segments:
        if isinstance(segment, Image):
            pieces.append(segment)
        elif segment.text.strip():
            if pieces and isinstance(pieces[-1], Text):
                pieces[-1] = Text(pieces[-1].text + segment.text)
            else:
                pieces.append(segment)
    return pieces


def summary(kind: Kind, grades: Sequence[Grade], parts: Sequence[str] = ()) -> dict[str, float]:
    """Shares in [0, 1] by name; of drawings also those right in each of a label's parts, which are named. An empty task
    has none: raises ValueError."""
    if not grades:
        raise ValueError(f"a {kind} task without cases cannot be summarized")
    right = fmean(m.right for m in grades)
    if kind == "interleaved":
        return {
            "valid": right,
            "words": fmean(m.words for m in grades),
            "digits": fmean(d for m in grades for d in m.digits),
        }
    if kind == "generation" and len(parts) > 1:
        apart = {part: fmean(bool(m.parts) and m.parts[place] for m in grades) for place, part in enumerate(parts)}
        return {"accuracy": right, **apart}
    return {"accuracy": right}
