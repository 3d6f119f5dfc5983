"""Rules that keep a document, drop it for a named reason, or keep it without an image: one function a section."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any
from urllib.parse import urlsplit

from PIL import Image as PILImage

from calumma.model.document import Document, Image
from calumma.model.images import open_header
from calumma.platform import storage
from calumma.platform.curation.specification import CaptionRules, ImageRules, NameRules, TextRules
from calumma.platform.curation.steps.words import all_text, is_pair, words
from calumma.platform.specification import SpecificationError

LANGUAGE = "language"  # key of a document's metadata
_LANGUAGE_SAMPLE = 4000  # characters by which the language is identified; more make it slower, no surer


@dataclass(frozen=True)
class Dropped:
    """A readable document that the specification does not want. `step` is the section that says so."""

    reason: str
    step: str = "form"
    facts: Mapping[str, str] = field(default_factory=dict, compare=False)  # for the document's metadata


Rule = Callable[[Document], Document | Dropped]


# -- licenses and domains ----------------------------------------------------------------------------------------------


def licenses(rules: NameRules, deny: frozenset[str]) -> Rule:
    """Licenses by name, in any case, with wildcards. Of several (`MIT, GPL-3.0`) every one must pass."""
    allowed, denied = [name.casefold() for name in rules.allow], [name.casefold() for name in rules.deny]

    def listed(name: str, patterns: list[str]) -> bool:
        return any(fnmatchcase(name, pattern) for pattern in patterns)

    def rule(document: Document) -> Document | Dropped:
        names = [name for part in document.license.split(",") if (name := part.strip().casefold())]
        if not names:
            return document if rules.unknown == "keep" else Dropped("no license", "licenses")
        if any(name in deny or listed(name, denied) for name in names):
            return Dropped("license denied", "licenses")
        if allowed and not all(listed(name, allowed) for name in names):
            return Dropped("license not allowed", "licenses")
        return document

    return rule


def domains(rules: NameRules, deny: frozenset[str]) -> Rule:
    """Domains of the documents' URLs; a rule for example.org holds for www.example.org, too."""
    allowed = frozenset(name.casefold().rstrip(".") for name in rules.allow)
    denied = deny | {name.casefold().rstrip(".") for name in rules.deny}

    def rule(document: Document) -> Document | Dropped:
        above = _domain_and_above(document.url)
        if not above:
            return document if rules.unknown == "keep" else Dropped("no domain", "domains")
        if not denied.isdisjoint(above):
            return Dropped("domain denied", "domains")
        if allowed and allowed.isdisjoint(above):
            return Dropped("domain not allowed", "domains")
        return document

    return rule


def _domain_and_above(url: str) -> list[str]:
    """www.example.org -> itself, example.org, org."""
    try:
        host = (urlsplit(url if "://" in url else f"//{url}").hostname or "").rstrip(".").casefold()
    except ValueError:  # brackets that hold no IPv6 address
        return []
    labels = host.split(".")
    return [".".join(labels[n:]) for n in range(len(labels))] if host else []


def denied_names(uri: str) -> frozenset[str]:
    """Names in a text file, one a line; `#` begins a comment. Raises StorageError."""
    lines = (line.partition("#")[0].strip().casefold() for line in storage.read_bytes(uri).decode().splitlines())
    return frozenset(line for line in lines if line)


# -- images ------------------------------------------------------------------------------------------------------------


def size_of(image: Image) -> tuple[int, int]:
    """Width and height in pixels as stored, from the head of the file."""
    if isinstance(image.data, PILImage.Image):
        return image.data.size
    if image.data.startswith(b"\x89PNG\r\n\x1a\n"):  # at once, since small drawings come by the thousand
        return int.from_bytes(image.data[16:20]), int.from_bytes(image.data[20:24])
    with open_header(image.data) as opened:
        return opened.size


def images(rules: ImageRules) -> Rule:
    """Sizes of images. Of a page only the failing images go, unless `pages` says otherwise."""

    def problem(image: Image) -> str | None:
        short, long = sorted(size_of(image))
        if short < rules.min_side:
            return f"image side below {rules.min_side} pixels"
        if rules.max_side is not None and long > rules.max_side:
            return f"image side above {rules.max_side} pixels"
        if rules.max_aspect is not None and long > rules.max_aspect * short:
            return f"image aspect above {rules.max_aspect:g}"
        return None

    def rule(document: Document) -> Document | Dropped:
        problems = {id(s): problem(s) for s in document.segments if isinstance(s, Image)}
        first = next((reason for reason in problems.values() if reason), None)
        if first is None:
            return document
        left = tuple(s for s in document.segments if not problems.get(id(s)))
        whole = rules.pages == "document" or is_pair(document) or document.is_conversation or not left
        return Dropped(first, "images") if whole else replace(document, segments=left)

    return rule


# -- captions ----------------------------------------------------------------------------------------------------------

_BOILERPLATE = re.compile(
    r"""
    \S+\.(jpe?g|png|gif|webp|bmp|tiff?|svg|heic|avif)  # a file
    | (img|dscn?|dscf?|pxl|mvi|scan|screen\s?shot|image|images|photo|picture|pic|figure|fig|thumb(nail)?|untitled|
       unnamed|default|foto|bild|logo|icon|banner|avatar|placeholder|null|none|n/?a)
      [\s_.#:()\d-]*((of|at)[\s.:\d]+|copy)?[\s\d()]*([ap]m)?
    | (https?://|www\.)\S+
    | (click|tap)\s(here|(on\s)?(the\s)?(image|photo|picture))?.{0,30}(enlarge|zoom|view|full\ssize)?.{0,20}
    | (view|see)\s(larger|full|original)\s?(size|image|photo)?.{0,20}
    | (no\s)?(image|photo|picture|alt\stext|description|caption)(\sis)?(\snot)?\s(available|provided|found)
    | (stock|file|royalty[\s-]free)\s(photo|image|picture|vector|illustration)s?(\s\#?\d+)?
    | [\W\d_]*                                          # nothing that is a word
    """,
    re.VERBOSE | re.IGNORECASE,
)


def captions(rules: CaptionRules) -> Rule:
    """Captions of pairs; other documents pass."""
    patterns = [re.compile(pattern) for pattern in rules.patterns]

    def problem(caption: str) -> str | None:
        caption_words = words(caption)
        if len(caption_words) < rules.min_words:
            return f"caption below {rules.min_words} words" if caption_words else "no caption"
        if rules.boilerplate and _BOILERPLATE.fullmatch(caption.strip()):
            return "caption is boilerplate"
        if rules.max_words is not None and len(caption_words) > rules.max_words:
            return f"caption above {rules.max_words} words"
        shown = [c for c in caption if not c.isspace()]
        if shown and sum(map(str.isalpha, shown)) < rules.min_letters * len(shown):
            return f"less than {rules.min_letters:.0%} of the caption letters"
        if caption_words and len(caption_words) - len(set(caption_words)) > rules.max_repetition * len(caption_words):
            return f"more than {rules.max_repetition:.0%} of the caption repeated words"
        if matched := next((p for p in patterns if p.search(caption)), None):
            return f"caption has {matched.pattern}"
        return None

    def rule(document: Document) -> Document | Dropped:
        if not is_pair(document):
            return document
        reason = problem(document.images[0].caption or "")
        return Dropped(reason, "captions") if reason else document

    return rule


# -- texts -------------------------------------------------------------------------------------------------------------


def texts(rules: TextRules) -> Rule:
    """Length and language; documents that say nothing pass. The language found is put into the metadata."""

    def rule(document: Document) -> Document | Dropped:
        text = all_text(document)
        if not text.strip():
            return document
        if not is_pair(document) and (reason := _length_problem(text, rules)):
            return Dropped(reason, "texts")
        if not rules.languages:
            return document
        name, probability = language(text)
        facts = {LANGUAGE: name}
        if name not in rules.languages:
            return Dropped(f"language {name}", "texts", facts)
        if probability < rules.min_probability:
            return Dropped("language uncertain", "texts", facts)
        return replace(document, metadata=document.metadata | facts)

    return rule


def _length_problem(text: str, rules: TextRules) -> str | None:
    if len(text) < rules.min_characters:
        return f"text below {rules.min_characters:,} characters"
    if rules.max_characters is not None and len(text) > rules.max_characters:
        return f"text above {rules.max_characters:,} characters"
    if not rules.min_words and rules.max_words is None:
        return None
    count = len(words(text))
    if count < rules.min_words:
        return f"text below {rules.min_words:,} words"
    if rules.max_words is not None and count > rules.max_words:
        return f"text above {rules.max_words:,} words"
    return None


def language(text: str) -> tuple[str, float]:
    """The most probable language of a text (ISO 639-1) and its probability."""
    name, probability = _identifier().classify(text[:_LANGUAGE_SAMPLE])
    return str(name), float(probability)


def check_languages(codes: list[str]) -> None:
    """Raises SpecificationError when one of them is never identified."""
    known = sorted(_identifier().labels)
    if unknown := sorted(set(codes) - set(known)):
        raise SpecificationError(f"texts.languages: {', '.join(unknown)} cannot be told; these can: {', '.join(known)}")


@functools.cache
def _identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
