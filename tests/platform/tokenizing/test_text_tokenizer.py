"""The text tokenizer's training: what is published, and what is never written over."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from PIL import Image as PILImage

from calumma.model.document import Document, Image, Text
from calumma.platform import storage
from calumma.platform.cluster.progress import no_progress
from calumma.platform.specification import SpecificationError, Tracking
from calumma.platform.storage.manifest import Manifest
from calumma.platform.tokenizing import text_tokenizer
from calumma.platform.tokenizing.specification import TextTokenizerSpecification
from calumma.platform.tracking.job_run import job_run
from calumma.platform.tracking.run import Run


@pytest.fixture
def text_spec(corpus: str, tmp_path: Path) -> TextTokenizerSpecification:
    """Curated lines in a storage of their own, and a text tokenizer to be trained on them."""
    shutil.copytree(f"{corpus}/curated/lines", tmp_path / "curated/lines")
    return TextTokenizerSpecification(
        storage=str(tmp_path), documents=["curated/lines"], output="made", vocabulary_size=300, image_codes=4
    )


@pytest.fixture
def run(text_spec: TextTokenizerSpecification, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    tracking = Tracking(uri=str(tmp_path_factory.mktemp("mlflow")))
    with job_run(text_spec.model_copy(update={"tracking": tracking})) as current:
        yield current


def test_the_text_tokenizer_is_published_with_its_report(
    text_spec: TextTokenizerSpecification, run: Run, tmp_path: Path
) -> None:
    made = text_tokenizer.train_text_tokenizer(text_spec, run, no_progress)
    manifest = Manifest.read(f"{tmp_path}/made")
    assert manifest == made
    manifest.verify(f"{tmp_path}/made", content=True)
    assert {entry.path for entry in manifest.files} == {"text_tokenizer.model", "vocabulary.json"}
    assert manifest.report["vocabulary_size"] == 300
    assert 1 < manifest.report["bytes_per_token"] < 20
    assert manifest.report["characters"] > 1000


def test_a_vocabulary_that_the_texts_do_not_support_is_refused(
    text_spec: TextTokenizerSpecification, run: Run, tmp_path: Path
) -> None:
    with pytest.raises(SpecificationError, match="no BPE vocabulary of 9000 ids"):
        text_tokenizer.train_text_tokenizer(text_spec.model_copy(update={"vocabulary_size": 9000}), run, no_progress)
    assert not storage.exists(f"{tmp_path}/made")


def test_a_tokenizer_is_replaced_by_a_trained_one_only_and_other_files_stay(
    text_spec: TextTokenizerSpecification, run: Run, tmp_path: Path
) -> None:
    first = text_tokenizer.train_text_tokenizer(text_spec, run, no_progress)
    (tmp_path / "made/notes.txt").write_text("mine")
    too_large = text_spec.model_copy(update={"vocabulary_size": 9000})
    with pytest.raises(SpecificationError, match="no BPE vocabulary"):
        text_tokenizer.train_text_tokenizer(too_large, run, no_progress)
    assert Manifest.read(str(tmp_path / "made")) == first
    first.verify(str(tmp_path / "made"), content=True)
    second = text_tokenizer.train_text_tokenizer(text_spec.model_copy(update={"image_codes": 8}), run, no_progress)
    assert (tmp_path / "made/notes.txt").read_text() == "mine"
    assert {entry.path for entry in second.files} == {"text_tokenizer.model", "vocabulary.json"}
    second.verify(str(tmp_path / "made"), content=True)


@pytest.mark.parametrize(
    ("output", "said"),
    [
        ("", "is the storage itself"),
        (".", "is the storage itself"),
        ("curated/..", "is the storage itself"),
        ("/", "is the storage itself or holds it"),
        ("curated/lines", "overlaps with .*curated/lines"),
        ("curated", "overlaps with .*curated/lines"),
        ("curated/lines/tokenizer", "overlaps with .*curated/lines"),
        ("other", "holds 'curated', and no 'text_tokenizer'"),
    ],
)
def test_a_tokenizer_is_not_written_over_something_else(
    text_spec: TextTokenizerSpecification, run: Run, tmp_path: Path, output: str, said: str
) -> None:
    shutil.copytree(tmp_path / "curated/lines", tmp_path / "other")
    before = storage.sizes(str(tmp_path))
    with pytest.raises(SpecificationError, match=f"output: .*{said}"):
        text_tokenizer.train_text_tokenizer(text_spec.model_copy(update={"output": output}), run, no_progress)
    assert storage.sizes(str(tmp_path)) == before


def test_a_limit_of_characters_leaves_no_source_out(picture: Callable[..., PILImage.Image]) -> None:
    long = [Document((Text("a" * 50),)) for _ in range(100)]
    short = [Document((Text("b" * 10),)), Document((Image(picture(0)), Text("c" * 10)))]
    taken = "".join(text_tokenizer.first_characters(text_tokenizer.texts([long, short]), 150))
    assert len(taken) == 150
    assert {"a", "b", "c"} == set(taken)
