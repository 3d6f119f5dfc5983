"""What all benchmarks have in common: items to be asked, and what their answers were worth."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from typing import Any

from calumma.model.document import Document, Image, Segment, Text
from calumma.platform.evaluation.metrics.intervals import Interval, of_mean
from calumma.platform.evaluation.systems.prompts import Answer, Sampling


class BenchmarkDataError(ValueError):
    """A benchmark's files that are missing, half there or of another form; the message names location and file."""


NUMBERS = {  # no shares
    "psnr", "ssim", "fid", "rfid", "clip_score", "diversity", "diversity_within", "frechet", "nearest", "nearest_real",
}  # fmt: skip
BEYOND_ONE = NUMBERS | {"cider"}  # shown times 100, and may be above


@dataclass(frozen=True)
class Item:
    """One question. `text`: what of it would be known to a model trained on it (question and answer), for the check of
    contamination. `later`: what the user says after the first answer, one after the other; each is answered, too."""

    id: str
    prompt: Document
    sampling: Sampling
    expected: Any
    text: str
    later: tuple[str, ...] = ()


@dataclass(frozen=True)
class Graded:
    """One item's verdict: a value for each metric, and what is shown of it."""

    values: dict[str, float]
    said: str
    expected: str


@dataclass(frozen=True)
class Measured:
    """A task's figures. `values`: of each item, in order, for intervals and paired tests; `metrics` has their means and
    what is measured of all items together. Figures are shares in [0, 1], but for those that `NUMBERS` names.
    `sheets`: PNGs of all answers together. `tokens`: prompt and text, where answers do not tell."""

    metrics: dict[str, float]
    values: dict[str, list[float]]
    graded: list[Graded]
    notes: list[str] = field(default_factory=list)
    sheets: dict[str, bytes] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)

    def interval(self, metric: str) -> Interval | None:
        values = self.values.get(metric)
        return of_mean(values, metric not in BEYOND_ONE) if values else None


Answers = Sequence[Sequence[Answer]]  # of each item, one for each turn of the user


def measured(
    graded: Sequence[Graded],
    together: dict[str, float] | None = None,
    notes: Sequence[str] = (),
    sheets: dict[str, bytes] | None = None,
) -> Measured:
    """The means of what items have, and what is measured of all `together`."""
    names = list(dict.fromkeys(name for one in graded for name in one.values))
    values = {name: [one.values[name] for one in graded if name in one.values] for name in names}
    metrics = {name: sum(each) / len(each) for name, each in values.items()}
    return Measured({**metrics, **(together or {})}, values, list(graded), list(notes), sheets or {})


Grade = Callable[[Sequence[Item], Answers], Measured]


def few_shots(examples: Sequence[Sequence[Segment]], question: Sequence[Segment]) -> Document:
    """A plain document: examples with their answers, then the question, to be continued. Without examples it is a
    conversation, which models after fine-tuning expect."""
    if not examples:
        return Document(tuple(question)).with_role("user")
    return Document(tuple(segment for example in examples for segment in example) + tuple(question))


def shown(document: Document, words: int = 400) -> str:
    """A document as one line; pictures as a mark."""
    parts = [s.text if isinstance(s, Text) else "[picture]" for s in document.segments]
    text = " ".join(" ".join(parts).split())
    return text if len(text) <= words else text[:words] + "…"


def dialogue(item: Item, answers: Sequence[Answer]) -> Document:
    """What was said so far: the prompt, each answer, and what the user said after it."""
    segments = list(item.prompt.segments)
    for answer, said in zip_longest(answers, item.later[: len(answers)]):
        segments += [replace(segment, role="assistant") for segment in answer.document.segments] or [
            Text("", "assistant")
        ]
        if said is not None:
            segments.append(Text(said, "user"))
    return Document(tuple(segments))


def first_text(answers: Sequence[Answer]) -> str:
    return answers[0].document.text if answers else ""


def pictures(answers: Sequence[Answer]) -> list[Image]:
    return answers[0].document.images if answers else []
