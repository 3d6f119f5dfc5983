"""What is held out is decided by what an example says."""

from __future__ import annotations

from pathlib import Path

import pytest

from calumma.jobs.tuning import split as dividing
from calumma.jobs.tuning.examples import WrongExamples
from calumma.jobs.tuning.split import Parts, split
from calumma.model import MixedModalModel
from calumma.model.document import Document, Text
from calumma.platform.cluster.progress import no_progress
from calumma.platform.shards import documents as document_shards
from calumma.platform.storage.manifest import FileEntry, Manifest


def curated(folder: Path, *documents: Document) -> str:
    data = document_shards.to_parquet(documents)
    (folder / "a.parquet").write_bytes(data)
    entry = FileEntry.from_bytes("a.parquet", data, rows=len(documents))
    Manifest(kind=document_shards.CURATED, files=[entry]).write(str(folder))
    return str(folder)


def talk(number: int) -> Document:
    return Document((Text(f"Question {number}?", "user"), Text(f"answer {number}", "assistant")))


def texts(folder: Path) -> list[str]:
    return [document.text for document in document_shards.read_documents(str(folder))]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "curated").mkdir()
    return tmp_path


def divided(place: Path, model: MixedModalModel, *documents: Document, share: float = 0.2) -> Parts:
    source = curated(place / "curated", *documents)
    return split(source, str(place), share, model.text_tokenizer, model.image_length, no_progress)


def test_equal_examples_are_on_one_side(place: Path, model: MixedModalModel) -> None:
    documents = [talk(number % 10) for number in range(30)]
    parts = divided(place, model, *documents)
    train, held_out = texts(place / "train"), texts(place / "held_out")
    assert set(train).isdisjoint(held_out)
    assert sorted([*train, *held_out]) == sorted(document.text for document in documents)
    assert (parts.train, parts.held_out) == (len(train), len(held_out))
    longest = max(len(model.encode(document)) for document in documents)
    assert parts.longest == longest
    assert parts.tokens == sum(len(model.encode(talk(0))) for _ in train)


def test_a_second_call_changes_nothing_and_reads_nothing(
    place: Path, model: MixedModalModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = divided(place, model, *map(talk, range(8)))
    before = (place / "train" / "manifest.json").read_bytes()
    monkeypatch.setattr(dividing, "_good", None)
    assert divided(place, model, *map(talk, range(8))) == first
    assert (place / "train" / "manifest.json").read_bytes() == before


def test_nothing_is_held_out_of_one_example(place: Path, model: MixedModalModel) -> None:
    assert divided(place, model, talk(1)).held_out == 0


def test_nothing_left_is_told(place: Path, model: MixedModalModel) -> None:
    with pytest.raises(WrongExamples, match="no example is left"):
        divided(place, model, Document((Text("only a question?", "user"),)))
