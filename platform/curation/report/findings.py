"""What a curation found, small whatever it read: counts by step, histograms, and samples of what was kept and dropped.

Parts are found in tasks and added up; the result does not depend on how documents were dealt to tasks. Samples are
those whose names hash lowest, which is a fair draw.
"""

from __future__ import annotations

import base64
import bisect
import hashlib
import io
import math
from collections.abc import Callable, Mapping
from typing import Any

from PIL import Image as PILImage
from pydantic import BaseModel, ConfigDict

from calumma.model.document import Document, Image, Text, UnreadableImage
from calumma.platform.curation.steps.filters import LANGUAGE, Dropped, size_of
from calumma.platform.curation.steps.words import all_text
from calumma.platform.sources.reading import name_of

KEPT, DROPPED, SCRUBBED = "kept", "dropped", "scrubbed"
SAMPLES = {KEPT: 12}  # of a source; of every reason:
SAMPLES_A_REASON = 4
THUMBNAIL = 144  # pixels of the longer side
EXCERPT = 360  # characters of a sample's text
SAMPLE_SEGMENTS = 6  # segments of a sample
NAMES = 60  # languages that are counted one by one
BIN_WIDTH = math.log(1.02)  # a histogram's bins are 2 % wide
Redactor = Callable[[Document], Document]
_TINY = 1e-6  # values nearer to 0 are 0


def bin_of(value: float) -> int:
    """The number of a value's bin: 0 for 0, growing with the value's logarithm, negative for negative values."""
    if abs(value) < _TINY:
        return 0
    number = 1 + math.floor(math.log(abs(value) / _TINY) / BIN_WIDTH)
    return number if value > 0 else -number


def bin_middle(number: int) -> float:
    """A value in the middle of a bin."""
    if number == 0:
        return 0.0
    return math.copysign(_TINY * math.exp((abs(number) - 0.5) * BIN_WIDTH), number)


class Sample(BaseModel):
    """A document as a report shows it. `parts`: ("text" | "image", text or data URL)."""

    model_config = ConfigDict(extra="forbid")

    rank: int
    name: str
    parts: list[tuple[str, str]]
    note: str = ""
    like: int | None = None  # the identity of what it duplicates
    other: Sample | None = None  # and that document


class Findings(BaseModel):
    """Of one source. `steps`: step -> reason -> documents. `measures`: what -> kept or dropped -> bin -> values.
    `seconds`: that each step took, of all processes together; of duplicates, to sign the documents."""

    model_config = ConfigDict(extra="forbid")

    steps: dict[str, dict[str, int]] = {}
    measures: dict[str, dict[str, dict[int, int]]] = {}
    languages: dict[str, dict[str, int]] = {}
    seconds: dict[str, float] = {}
    marks: dict[str, int] = {}  # what was scrubbed, by mark or hook
    images_removed: int = 0  # from pages that passed
    samples: dict[str, list[Sample]] = {}

    def keep(self, document: Document, scores: Mapping[str, float] | None = None) -> None:
        self._measure(document, KEPT, scores or {})
        self._sample(KEPT, document, scores=scores)

    def drop(
        self,
        document: Document,
        why: Dropped,
        scores: Mapping[str, float] | None = None,
        like: int | None = None,
        redactor: Redactor | None = None,
    ) -> None:
        """`like`: the identity of what it duplicates. `redactor`: takes out what a report must not show."""
        reasons = self.steps.setdefault(why.step, {})
        reasons[why.reason] = reasons.get(why.reason, 0) + 1
        self._measure(document, DROPPED, scores or {})
        self._sample(f"{why.step}: {why.reason}", document, scores=scores, like=like, redactor=redactor)

    def scrubbed(self, document: Document) -> None:
        """Show what a scrubbed document looks like; marks are counted by `marks`."""
        self._sample(SCRUBBED, document, around="<")

    def add(self, other: Findings) -> None:
        """Add the findings of another task."""
        for step, reasons in other.steps.items():
            _add(self.steps.setdefault(step, {}), reasons)
        for what, outcomes in other.measures.items():
            for outcome, counts in outcomes.items():
                _add(self.measures.setdefault(what, {}).setdefault(outcome, {}), counts)
        for outcome, languages in other.languages.items():
            _add(self.languages.setdefault(outcome, {}), languages)
        _add(self.seconds, other.seconds)
        _add(self.marks, other.marks)
        self.images_removed += other.images_removed
        for key, samples in other.samples.items():
            merged = sorted([*self.samples.get(key, []), *samples], key=lambda s: (s.rank, s.name))
            self.samples[key] = merged[: SAMPLES.get(key, SAMPLES_A_REASON)]

    def _measure(self, document: Document, outcome: str, scores: Mapping[str, float]) -> None:
        values: list[tuple[str, float]] = [(f"score {name}", score) for name, score in scores.items()]
        if text := all_text(document):
            values.append(("characters", len(text)))
        for image in document.images:
            short, long = sorted(size_of(image))
            values += [("image side", short), ("image aspect", long / short)]
        for what, value in values:
            counts = self.measures.setdefault(what, {}).setdefault(outcome, {})
            number = bin_of(value)
            counts[number] = counts.get(number, 0) + 1
        if language := document.metadata.get(LANGUAGE):
            _add(self.languages.setdefault(outcome, {}), {language: 1})

    def _sample(
        self,
        key: str,
        document: Document,
        scores: Mapping[str, float] | None = None,
        like: int | None = None,
        around: str = "",
        redactor: Redactor | None = None,
    ) -> None:
        name = name_of(document)
        rank = int.from_bytes(hashlib.blake2b(name.encode("utf-8", "replace"), digest_size=6).digest())
        samples, limit = self.samples.setdefault(key, []), SAMPLES.get(key, SAMPLES_A_REASON)
        if len(samples) == limit and rank >= samples[-1].rank:
            return
        note = ", ".join(f"{scorer} {score:.4g}" for scorer, score in (scores or {}).items())
        parts = excerpt(redactor(document) if redactor is not None else document, around)
        sample = Sample(rank=rank, name=name, parts=parts, note=note, like=like)
        bisect.insort(samples, sample, key=lambda s: (s.rank, s.name))
        del samples[limit:]


def _add(counts: dict[Any, Any], more: Mapping[Any, float]) -> None:
    for name, count in more.items():
        counts[name] = counts.get(name, 0) + count


def excerpt(document: Document, around: str = "") -> list[tuple[str, str]]:
    """The beginning of a document, or of what is `around` something, as excerpts and small pictures."""
    parts: list[tuple[str, str]] = []
    left = EXCERPT
    for s in document.segments[:SAMPLE_SEGMENTS]:
        if isinstance(s, Text):
            words = " ".join(s.text.split())
            begin = max(0, words.find(around) - EXCERPT // 2) if around and len(words) > left else 0
            text = words[begin : begin + left]
            left -= len(text)
            if text:
                speaker = f"{s.role}: " if s.role else ""
                cut = "…" if begin + len(text) < len(words) else ""
                parts.append(("text", f"{speaker}{'…' if begin else ''}{text}{cut}"))
        else:
            parts.append(("image", _thumbnail(s)))
            if s.caption and not any(isinstance(other, Text) for other in document.segments):
                parts.append(("text", s.caption[:EXCERPT]))
    return parts


def _thumbnail(image: Image) -> str:
    try:
        picture = image.open()
    except UnreadableImage:
        return ""
    picture.thumbnail((THUMBNAIL, THUMBNAIL), PILImage.Resampling.LANCZOS)
    buffer = io.BytesIO()
    kind = "PNG" if max(picture.size) <= 64 else "JPEG"  # small drawings keep their edges
    picture.save(buffer, kind, **({} if kind == "PNG" else {"quality": 80}))
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"
