"""Rules of a curation: which documents they drop, and for what reason."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from PIL import Image as PILImage

from calumma.model.document import Document, Image, Text
from calumma.platform.curation.specification import CurateSpecification
from calumma.platform.curation.steps import chain
from calumma.platform.curation.steps.chain import StepChain
from calumma.platform.curation.steps.filters import size_of
from calumma.platform.sources.files import BadInput
from calumma.platform.specification import SpecificationError, validate


def picture(width: int, height: int) -> bytes:
    buffer = io.BytesIO()
    PILImage.new("RGB", (width, height), (width % 256, height % 256, 7)).save(buffer, "PNG")
    return buffer.getvalue()


def specification(**fields: Any) -> CurateSpecification:
    values = {"job": "curate", "storage": "/nowhere", **fields}
    values.setdefault("sources", [{"name": "a", "format": "jsonl", "location": "raw"}])
    return validate(CurateSpecification, values, "test")


def reason(document: Document, **fields: Any) -> str | None:
    """Why a document is dropped, as `step: reason`."""
    checked = StepChain(specification(**fields), "a")(document)
    assert not isinstance(checked, BadInput)
    return f"{checked.dropped.step}: {checked.dropped.reason}" if checked.dropped else None


def pair(caption: str | None, width: int = 64, height: int = 64) -> Document:
    return Document((Image(picture(width, height), caption),))


def text(words: str, **fields: Any) -> Document:
    return Document((Text(words),), **fields)


@pytest.mark.parametrize(
    ("license", "rules", "said"),
    [
        ("CC-BY-4.0", {"allow": ["cc-by*", "mit"]}, None),
        ("MIT", {"allow": ["cc-by*", "mit"]}, None),
        ("GPL-3.0", {"allow": ["cc-by*"]}, "license not allowed"),
        ("MIT, GPL-3.0", {"allow": ["mit"]}, "license not allowed"),
        ("MIT, GPL-3.0", {"deny": ["gpl*"]}, "license denied"),
        ("MIT", {"deny": ["gpl*"]}, None),
        ("", {"allow": ["mit"]}, None),
        ("", {"unknown": "drop"}, "no license"),
    ],
)
def test_licenses_are_allowed_and_denied_by_name(license: str, rules: dict[str, Any], said: str | None) -> None:
    assert reason(text("x", license=license), licenses=rules) == (said and f"licenses: {said}")


@pytest.mark.parametrize(
    ("url", "rules", "said"),
    [
        ("https://www.example.org/a?b=c", {"deny": ["example.org"]}, "domain denied"),
        ("https://example.org:8080/", {"deny": ["EXAMPLE.org."]}, "domain denied"),
        ("https://notexample.org/", {"deny": ["example.org"]}, None),
        ("https://example.org.evil.net/", {"allow": ["example.org"]}, "domain not allowed"),
        ("example.org/page", {"allow": ["example.org"]}, None),
        ("", {"unknown": "drop"}, "no domain"),
        ("http://[broken/", {"unknown": "drop"}, "no domain"),
    ],
)
def test_a_domain_covers_its_subdomains_and_nothing_else(url: str, rules: dict[str, Any], said: str | None) -> None:
    assert reason(text("x", url=url), domains=rules) == (said and f"domains: {said}")


def test_denied_names_may_be_in_a_file(tmp_path: Path) -> None:
    (tmp_path / "denied.txt").write_text("# trackers\nads.example  # seen in 2020\n\nTracker.NET\n")
    rules = {"deny_file": str(tmp_path / "denied.txt")}
    assert reason(text("x", url="https://a.tracker.net/"), domains=rules) == "domains: domain denied"
    assert reason(text("x", url="https://www.ads.example/"), domains=rules) == "domains: domain denied"
    assert reason(text("x", url="https://trackers/"), domains=rules) is None


@pytest.mark.parametrize(
    ("size", "said"),
    [
        ((64, 64), None),
        ((63, 200), "image side below 64 pixels"),
        ((64, 193), "image aspect above 3"),
        ((64, 192), None),
        ((401, 200), "image side above 400 pixels"),
    ],
)
def test_images_of_pairs_have_bounds(size: tuple[int, int], said: str | None) -> None:
    rules = {"min_side": 64, "max_side": 400, "max_aspect": 3}
    assert reason(pair("x", *size), images=rules) == (said and f"images: {said}")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
def test_the_size_of_an_image_is_read_from_its_head(kind: str) -> None:
    buffer = io.BytesIO()
    PILImage.new("RGB", (70, 300)).save(buffer, kind)
    assert size_of(Image(buffer.getvalue())) == (70, 300)
    assert size_of(Image(PILImage.new("RGB", (70, 300)))) == (70, 300)


def test_a_small_image_leaves_its_page_and_takes_a_conversation_along() -> None:
    small, large = Image(picture(8, 8)), Image(picture(80, 80))
    rules = {"min_side": 64}
    page = Document((Text("before"), small, Text("after"), large))
    checked = StepChain(specification(images=rules), "a")(page)
    assert not isinstance(checked, BadInput)
    assert checked.document.segments == (Text("before"), Text("after"), large)
    assert checked.images_removed == 1
    assert reason(page, images={**rules, "pages": "document"}) == "images: image side below 64 pixels"
    assert reason(Document((small, small)), images=rules) == "images: image side below 64 pixels"
    chat = Document((Text("what?", "user"), Image(picture(8, 8), None, "user"), Text("small", "assistant")))
    assert reason(chat, images=rules) == "images: image side below 64 pixels"


@pytest.mark.parametrize(
    ("caption", "said"),
    [
        ("a dog on the beach", None),
        ("two dogs", "caption below 3 words"),
        (None, "no caption"),
        ("...", "no caption"),
        ("a b c d e f g h i", "caption above 8 words"),
        ("4 2 7 9 13 of it", "less than 50% of the caption letters"),
        ("sale sale sale sale", "more than 50% of the caption repeated words"),
        ("a photo of Getty Images stock", "caption has (?i)getty"),
    ],
)
def test_captions_have_rules(caption: str | None, said: str | None) -> None:
    rules = {"min_words": 3, "max_words": 8, "min_letters": 0.5, "max_repetition": 0.5, "patterns": ["(?i)getty"]}
    assert reason(pair(caption), captions=rules) == (said and f"captions: {said}")


@pytest.mark.parametrize(
    "caption",
    [
        "IMG_2034.jpg",
        "DSC0012",
        "image 3 of 7",
        "Screenshot 2024-05-01 at 10.20 am",
        "https://example.org/a",
        "untitled (2)",
        "stock photo",
        "Image not available",
        "click to enlarge",
        "1234",
        "logo",
    ],
)
def test_captions_that_say_nothing_are_boilerplate(caption: str) -> None:
    assert reason(pair(caption), captions={}) == "captions: caption is boilerplate"
    assert reason(pair(caption), captions={"boilerplate": False}) is None


@pytest.mark.parametrize(
    "caption",
    [
        "image of a dog",
        "Photo: the harbour at dawn",
        "logo of the bakery",
        "see the original sketch by the river",
        "a.b",
    ],
)
def test_captions_that_only_begin_like_boilerplate_stay(caption: str) -> None:
    assert reason(pair(caption), captions={}) is None


def test_caption_rules_leave_other_documents_alone() -> None:
    assert reason(Document((Image(picture(9, 9), "x"), Text("a page"))), captions={"min_words": 5}) is None


@pytest.mark.parametrize(
    ("rules", "said"),
    [
        ({"min_characters": 22}, "text below 22 characters"),
        ({"max_characters": 20}, "text above 20 characters"),
        ({"min_words": 5}, "text below 5 words"),
        ({"max_words": 3}, "text above 3 words"),
        ({"min_words": 4, "max_words": 4, "min_characters": 21, "max_characters": 21}, None),
    ],
)
def test_texts_have_lengths(rules: dict[str, Any], said: str | None) -> None:
    assert reason(text("four words, no more!!"), texts=rules) == (said and f"texts: {said}")
    assert reason(pair("four words, no more!!"), texts=rules) is None


def test_characters_of_scripts_without_spaces_count_as_words() -> None:
    assert reason(text("人工智能"), texts={"min_words": 4}) is None
    assert reason(text("人工智能"), texts={"min_words": 5}) == "texts: text below 5 words"


def test_languages_are_told_and_noted() -> None:
    english = "The ship left the harbour early in the morning, before anyone was awake."
    german = "Das Schiff verließ den Hafen früh am Morgen, bevor jemand wach war."
    rules = {"languages": ["en"]}
    checked = StepChain(specification(texts=rules), "a")(text(english))
    assert not isinstance(checked, BadInput)
    assert checked.document.metadata["language"] == "en"
    assert reason(text(german), texts=rules) == "texts: language de"
    assert reason(text(german), texts={"languages": ["en", "de"]}) is None
    assert reason(pair(german), texts=rules) == "texts: language de"
    assert reason(text(english), texts={**rules, "min_probability": 1.0}) == "texts: language uncertain"
    assert reason(Document((Image(picture(9, 9)),)), texts=rules) is None


def test_the_first_reason_counts() -> None:
    document = Document((Image(picture(8, 8), "IMG_1.jpg"),), license="gpl", url="https://ads.net")
    rules: dict[str, Any] = {
        "licenses": {"deny": ["gpl"]},
        "domains": {"deny": ["ads.net"]},
        "images": {"min_side": 9},
        "captions": {},
    }
    for step in list(rules):
        found = reason(document, **rules)
        assert found is not None
        assert found.startswith(f"{step}: ")
        del rules[step]
    assert reason(document) is None


def test_a_step_applies_to_the_sources_it_names() -> None:
    sources = [{"name": name, "format": "jsonl", "location": name} for name in ("a", "b")]
    spec = specification(sources=sources, texts={"min_words": 9, "sources": ["b"]})
    dropped = []
    for name in ("a", "b"):
        checked = StepChain(spec, name)(text("few words"))
        assert not isinstance(checked, BadInput)
        dropped.append(checked.dropped is not None)
    assert dropped == [False, True]
    assert spec.only(["a"]).texts is None
    assert spec.only(["b"]).texts == spec.texts


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"texts": {"sources": ["c"]}}, "texts.sources: there is no source c; sources are a"),
        ({"scorers": {"x": {"factory": "a:b", "sources": ["c"]}}}, "scorers.x.sources: there is no source c"),
        ({"captions": {"patterns": ["("]}}, "is no regular expression"),
        ({"duplicates": {"near": {"similarity": 1.5}}}, "duplicates.near.similarity"),
    ],
)
def test_rules_that_cannot_be_are_told_at_once(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(SpecificationError) as error:
        specification(**fields)
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"texts": {"languages": ["en", "xx"]}}, r"texts\.languages: xx cannot be told; these can: .*\ben\b"),
        ({"scrub": {"secrets": ["Nothing"]}}, r"no detector Nothing; these are: .*AWSKeyDetector"),
        ({"scrub": {"hooks": ["json:missing"]}}, r"scrub\.hooks: there is no 'json:missing'"),
        (
            {"scorers": {"x": {"factory": "json"}}},
            r"scorers\.x\.factory: 'json' must look like package\.module:function",
        ),
        ({"scorers": {"x": {"factory": "no.such:thing"}}}, r"scorers\.x\.factory: there is no 'no\.such:thing'"),
    ],
)
def test_names_that_lead_nowhere_are_told_before_any_work(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(SpecificationError, match=said):
        chain.check_names(specification(**fields))
