"""The documents in colour: read without a complaint, equal when repeated, and nothing that trains shows what is held
out."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from PIL import Image as PILImage

from calumma.jobs.emoji import documents
from calumma.jobs.emoji.conversations import with_article
from calumma.jobs.emoji.course import COLOUR
from calumma.jobs.emoji.documents import FAST, ColourDocumentsSpecification
from calumma.jobs.quickstart import steps
from calumma.jobs.quickstart.steps import Options
from calumma.model.document import Document
from calumma.platform.sources import files, reading
from calumma.platform.storage.manifest import Manifest

SOURCES = {
    source["name"]: source["format"]
    for source in steps.step_specification("curate", Options(Path("w"), course=COLOUR)).model_dump()["sources"]
}
TRAINED = [name for name in SOURCES if name.startswith(("pairs", "pages", "chat_"))] + [
    "pictures_train",
    "pictures_more",
]


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> ColourDocumentsSpecification:
    made = ColourDocumentsSpecification(storage=str(tmp_path_factory.mktemp("colour")), sizes=FAST)
    documents.write(made)
    return made


def read(spec: ColourDocumentsSpecification, source: str) -> list[Document]:
    folder = f"{spec.output_uri}/{source}"
    items = [
        item
        for uri in reading.list_source(SOURCES[source], folder)[0]
        for item in reading.read_file(SOURCES[source], source, uri)
    ]
    assert not [item for item in items if isinstance(item, files.BadInput)]
    return [item for item in items if isinstance(item, Document)]


def shown(spec: ColourDocumentsSpecification, source: str) -> set[bytes]:
    return {image.open().tobytes() for document in read(spec, source) for image in document.images}


def test_every_source_is_read(spec: ColourDocumentsSpecification) -> None:
    counted = Manifest.read(spec.output_uri).report["documents"]
    assert {name: len(read(spec, name)) for name in SOURCES} == counted
    assert set(counted) == set(SOURCES)


def test_nothing_that_trains_shows_a_held_out_picture(spec: ColourDocumentsSpecification) -> None:
    held_out = shown(spec, "pictures_held_out")
    assert len(held_out) == len(documents.pictures(spec)[1])
    for source in TRAINED:
        assert shown(spec, source).isdisjoint(held_out), source
    assert shown(spec, "ask_drawing") <= held_out
    assert held_out <= shown(spec, "judge_train")  # the judge is no part of the model
    assert shown(spec, "judge_held_out").isdisjoint(shown(spec, "judge_train"))


def test_an_edit_starts_from_a_trained_picture_and_ends_with_a_held_out_one(spec: ColourDocumentsSpecification) -> None:
    trained = {p.word for p in documents.pictures(spec)[0]}
    for document in read(spec, "ask_edit"):
        before, after = (image.caption or "" for image in document.images)
        assert before in trained
        assert after not in trained
        thing, skin, style = after.split(" | ")
        assert before.split(" | ")[0] == thing
        assert (skin if skin != "usual" else style) in document.text


def test_equal_specifications_write_equal_documents(spec: ColourDocumentsSpecification, tmp_path: Path) -> None:
    again = documents.write(spec.model_copy(update={"storage": str(tmp_path)}))
    assert [entry.sha256 for entry in again.files] == [e.sha256 for e in Manifest.read(spec.output_uri).files]


def test_questions_are_about_held_out_combinations(spec: ColourDocumentsSpecification) -> None:
    asked = COLOUR.questions(spec)
    assert {question.kind for question in asked} == set(COLOUR.kinds)
    held_out = {p.word for p in documents.pictures(spec)[1]}
    for question in asked:
        if question.kind == "recognition":
            assert question.picture is not None
            assert question.picture.word in held_out
            assert PILImage.open(io.BytesIO(question.picture.png())).size == (64, 64)


@pytest.mark.parametrize(
    ("phrase", "said"),
    [
        ("red apple", "a red apple"),
        ("owl", "an owl"),
        ("grapes", "grapes"),
        ("thumbs up", "thumbs up"),
        ("OK hand", "OK hand"),
        ("wine glass", "a wine glass"),
        ("octopus", "an octopus"),
    ],
)
def test_articles(phrase: str, said: str) -> None:
    assert with_article(phrase) == said
