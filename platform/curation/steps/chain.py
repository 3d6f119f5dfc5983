"""The steps that look at one document alone, in their order; the first reason to drop a document is what counts."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from calumma.model.document import Document, Image, Text, UnreadableImage, without_layout
from calumma.platform.curation.specification import CurateSpecification, CurationStep
from calumma.platform.curation.steps import decontaminate, filters, scrub
from calumma.platform.curation.steps.filters import Dropped, Rule
from calumma.platform.curation.steps.signatures import image_bytes
from calumma.platform.curation.steps.words import hash_fraction, is_pair
from calumma.platform.sources import files, reading
from calumma.platform.sources.files import BadInput
from calumma.platform.sources.notes import Notes
from calumma.platform.specification import import_function

In = TypeVar("In")
Out = TypeVar("Out")
# The steps that drop documents, in their order. Scrubbing stands before the last two.
STEPS = ("form", "licenses", "domains", "images", "captions", "texts", "decontaminate", "scorers", "duplicates")


def applies(step: CurationStep | None, source: str) -> bool:
    """Whether a specification asks for a step for this source."""
    return step is not None and (step.sources is None or source in step.sources)


def check_names(spec: CurateSpecification) -> None:
    """Find, before any work, what the steps name: languages, detectors, functions. Raises SpecificationError."""
    if spec.texts is not None and spec.texts.languages:
        filters.check_languages(spec.texts.languages)
    if spec.scrub is not None:
        scrub.Scrubber(spec.scrub)
    for name, scorer in spec.scorers.items():
        import_function(scorer.factory, f"scorers.{name}.factory")


@dataclass(frozen=True)
class CheckedDocument:
    """A document as far as the steps took it (its pair not yet in order), and why it is dropped, if it is."""

    document: Document
    dropped: Dropped | None = None
    images_removed: int = 0
    scrubbed: bool = False


class StepChain:
    """The steps of one source. Raises SpecificationError and StorageError when something they name is not there."""

    def __init__(
        self, spec: CurateSpecification, source: str, index: str | None = None, notes: Notes | None = None
    ) -> None:
        """`index`: where decontamination's index is. `notes`: where damage is told that does not matter."""
        self._spec, self._notes = spec, Notes() if notes is None else notes
        self._strict = spec.images is not None and spec.images.strict and applies(spec.images, source)
        self.seconds: dict[str, float] = {}  # that each step has taken
        self.scrubber = scrub.Scrubber(spec.scrub) if spec.scrub is not None and applies(spec.scrub, source) else None
        # For samples in the report of documents dropped earlier: what it replaces is not counted.
        self.redactor = scrub.Scrubber(spec.scrub) if spec.scrub is not None and self.scrubber is not None else None
        self._rules: list[tuple[str, Rule]] = []
        for step, make in (("licenses", filters.licenses), ("domains", filters.domains)):
            rules = getattr(spec, step)
            if applies(rules, source):
                file = rules.deny_file
                denied = filters.denied_names(spec.locate(file)) if file else frozenset[str]()
                self._rules.append((step, make(rules, denied)))
        for step, check in (("images", filters.images), ("captions", filters.captions), ("texts", filters.texts)):
            if applies(getattr(spec, step), source):
                self._rules.append((step, check(getattr(spec, step))))
        if spec.decontaminate is not None and applies(spec.decontaminate, source) and index is not None:
            overlap = decontaminate.overlap_rule(spec.decontaminate, spec.decontaminate.against, index)
            self._rules.append(("decontaminate", overlap))

    def __call__(self, item: files.Item) -> CheckedDocument | BadInput:
        checked = self._timed("form", self._check_form, item)
        if isinstance(checked, BadInput) or checked.dropped is not None:
            return checked
        document = checked.document
        images = len(document.images)
        for step, rule in self._rules:
            result = self._timed(step, rule, document)
            if isinstance(result, Dropped):
                return CheckedDocument(replace(document, metadata={**document.metadata, **result.facts}), result)
            document = result
        clean = document if self.scrubber is None else self._timed("scrub", self.scrubber, document)
        return CheckedDocument(clean, None, images - len(document.images), clean != document)

    def _check_form(self, item: files.Item) -> CheckedDocument | BadInput:
        return check_form(item, self._spec.min_text, self._strict, self._notes)

    def _timed(self, step: str, work: Callable[[In], Out], value: In) -> Out:
        begin = time.perf_counter()
        result = work(value)
        self.seconds[step] = self.seconds.get(step, 0.0) + time.perf_counter() - begin
        return result


def check_form(item: files.Item, min_text: int, strict: bool, notes: Notes) -> CheckedDocument | BadInput:
    """What every document must be: readable, and not empty. What of images was damaged and read all the same (never if
    `strict`) goes to `notes`."""
    if isinstance(item, BadInput):
        return item
    document = replace(item, segments=without_layout(item.segments))
    if problem := _unreadable(document, strict, notes):
        return problem
    if not document.segments:
        return CheckedDocument(document, Dropped("empty"))
    if document.is_conversation and not any(s.role == "assistant" and s.trained for s in document.segments):
        return CheckedDocument(document, Dropped("conversation without an answer"))
    if not document.images and not document.is_conversation and len(document.text.strip()) < min_text:
        return CheckedDocument(document, Dropped(f"shorter than {min_text} characters"))
    return CheckedDocument(document)


def order_pair(document: Document, seed: int, image_first: float) -> Document:
    """A pair (one image with a caption) as image then caption, or caption then image in the other 1 - `image_first` of
    the cases; its content decides, so a rerun decides alike. Other documents keep their order (paper section 2.2)."""
    if not is_pair(document) or not (image := document.images[0]).caption:
        return document
    caption = Text(image.caption)
    first = hash_fraction(seed, [image.caption.encode(), image_bytes(image)]) < image_first
    return replace(document, segments=(image, caption) if first else (caption, image))


def _unreadable(document: Document, strict: bool, notes: Notes) -> BadInput | None:
    name = reading.name_of(document)
    texts = [s.text if isinstance(s, Text) else s.caption or "" for s in document.segments]
    for text in (*texts, document.license, document.url):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            return BadInput(name, f"text is not valid Unicode: {error.reason} at character {error.start}")
    images: Sequence[Image] = document.images
    for index, image in enumerate(images):
        place = name if len(images) == 1 else f"{name}, image {index}"
        try:
            decoded = image.decode(strict)
        except UnreadableImage as error:
            return BadInput(place, str(error))
        if decoded.mended is not None:
            notes.warn(place, decoded.mended)
    return None
