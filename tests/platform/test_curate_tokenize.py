"""Raw files -> curated documents -> token shards: what is kept, what is reported, and that a rerun makes the same.

All but the last test run the jobs' tasks in this process; the last runs both jobs on the cluster.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import boto3
import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from moto.server import ThreadedMotoServer
from PIL import Image as PILImage

from calumma.model.config import ImageTokenizerConfig
from calumma.model.document import Document, Image, Segment, Text
from calumma.model.encoding import DocumentEncoder
from calumma.model.image_tokenizer import ImageTokenizer
from calumma.model.text_tokenizer import TextTokenizer, train_text_tokenizer
from calumma.model.vocabulary import Vocabulary
from calumma.platform import storage
from calumma.platform.config import CurateSpecification, SpecificationError, TokenizeSpecification
from calumma.platform.data import curate, pipeline, shards, tokenize
from calumma.platform.data.curate import Dropped, TooMuchBadInput, ordered, prepare
from calumma.platform.data.manifest import MANIFEST, FileEntry, Manifest
from calumma.platform.data.shards import read_documents
from calumma.platform.data.sources import BadInput
from calumma.platform.data.tokenize import DocumentsUnusable, windows
from calumma.platform.progress import silent

CODES = 8  # entries of the tests' codebook; an image is 4x4 of them
IMAGE_LENGTH = 16 + 2
CONTEXT = 63


class Recorder:
    """What a job logs."""

    def __init__(self) -> None:
        self.metrics: dict[str, float] = {}
        self.images: dict[str, PILImage.Image] = {}

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.metrics |= metrics

    def log_image(self, image: PILImage.Image, path: str) -> None:
        self.images[path] = image


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Tasks run in this process; the list names the sources that were worked on."""
    return run_here(monkeypatch)


def run_here(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    worked: list[str] = []

    def in_order(tasks: Sequence[Any], work: Any, resources: Any, arguments: Any = None) -> Iterator[Any]:
        function = work(**arguments) if isinstance(work, type) else work
        for task in tasks:
            worked.append(Path(task["output"]).name)
            yield json.loads(json.dumps(function(json.loads(json.dumps(task)))))

    monkeypatch.setattr(pipeline, "in_order", in_order)
    return worked


def png(shade: int) -> bytes:
    buffer = io.BytesIO()
    PILImage.new("RGB", (8, 8), (shade % 256, shade // 256, 99)).save(buffer, "PNG")
    return buffer.getvalue()


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def write_lines(path: Path, rows: list[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def pair(number: int, image: bytes | None = None) -> list[tuple[str, bytes]]:
    return [(f"{number:04d}.png", image or png(number)), (f"{number:04d}.txt", f"number {number}".encode())]


def raw(root: Path, pairs: int = 60) -> None:
    """Two sources: pairs in two tars, and texts of growing length."""
    half = pairs // 2
    write_tar(root / "raw/pairs/a.tar", [member for n in range(half) for member in pair(n)])
    write_tar(root / "raw/pairs/b.tar", [member for n in range(half, pairs) for member in pair(n)])
    write_lines(root / "raw/text.jsonl", [{"text": f"text {n}: " + "more words " * n} for n in range(30)])


def curation(root: Path, **fields: Any) -> CurateSpecification:
    values: dict[str, Any] = {
        "storage": str(root),
        "sources": [
            {"name": "pairs", "format": "webdataset", "location": "raw/pairs"},
            {"name": "text", "format": "jsonl", "location": "raw/text.jsonl"},
        ],
        "documents_per_shard": 25,
        **fields,
    }
    return CurateSpecification.model_validate(values)


def run_curate(spec: CurateSpecification) -> tuple[Manifest, Recorder]:
    recorder = Recorder()
    return curate.run(spec, recorder, silent), recorder  # type: ignore[arg-type]


def files_below(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# -- one document ------------------------------------------------------------------------------------------------------


def test_a_pair_is_turned_by_its_content_and_keeps_its_caption() -> None:
    image = Image(png(1), "seven")
    assert ordered(Document((image,)), 0, 1.0).segments == (image, Text("seven"))
    assert ordered(Document((image,)), 0, 0.0).segments == (Text("seven"), image)


@given(st.integers(0, 1000), st.floats(0.2, 0.8))
def test_image_first_is_a_share_of_the_pairs(seed: int, share: float) -> None:
    documents = [Document((Image(b"image %d" % n, "x"),)) for n in range(400)]
    turned = [ordered(document, seed, share) for document in documents]
    assert turned == [ordered(document, seed, share) for document in documents]
    first = sum(isinstance(document.segments[0], Image) for document in turned) / 400
    assert abs(first - share) < 0.13  # five standard deviations


@pytest.mark.parametrize(
    "segments",
    [
        (Image(png(1)),),
        (Text("a"), Image(png(1), "b")),
        (Image(png(1), "a"), Image(png(2), "b")),
        (Text("Draw.", "user"), Image(png(1), "a", "assistant")),
    ],
)
def test_everything_but_a_pair_keeps_its_order(tmp_path: Path, segments: tuple[Segment, ...]) -> None:
    document = Document(segments)
    assert prepare(document, curation(tmp_path, image_first=0.0)) == document


def test_white_space_beside_an_image_of_the_same_speaker_is_layout(tmp_path: Path) -> None:
    page = Document((Text("  three "), Image(png(1)), Text(" "), Image(png(2)), Text("\nend ")))
    kept = prepare(page, curation(tmp_path))
    assert isinstance(kept, Document)
    assert kept.segments == (Text("  three"), Image(png(1)), Image(png(2)), Text("end "))
    chat = Document((Text("Draw ", "user"), Image(png(1), None, "assistant")))
    assert prepare(chat, curation(tmp_path)) == chat


@pytest.mark.parametrize(
    ("document", "reason"),
    [
        (Document(()), "empty"),
        (Document((Text(" ab \n"),)), "shorter than 3 characters"),
        (Document((Text("hello?", "user"),)), "conversation without an answer"),
    ],
)
def test_unwanted_documents_are_dropped_with_a_reason(tmp_path: Path, document: Document, reason: str) -> None:
    assert prepare(document, curation(tmp_path, min_text=3)) == Dropped(reason)


@pytest.mark.parametrize(
    ("segments", "name", "said"),
    [
        ((Image(b"no image", "x"),), "a.tar: 1.png", "not a readable image"),
        ((Image(png(1)[:48], "x"),), "a.tar: 1.png", "not a readable image"),
        ((Image(png(1)), Image(b"no image")), "a.tar: 1.png, image 1", "not a readable image"),
        ((Text("lone \ud800"),), "a.tar: 1.png", "not valid Unicode"),
    ],
)
def test_what_cannot_be_decoded_is_bad_input(tmp_path: Path, segments: Any, name: str, said: str) -> None:
    result = prepare(Document(segments, metadata={"name": "a.tar: 1.png"}), curation(tmp_path))
    assert isinstance(result, BadInput)
    assert result.name == name
    assert said in result.reason


# -- curate ------------------------------------------------------------------------------------------------------------


def test_curated_documents_are_published_by_source_and_as_a_whole(tmp_path: Path, here: list[str]) -> None:
    raw(tmp_path)
    spec = curation(tmp_path)
    manifest, recorder = run_curate(spec)
    documents = list(read_documents(f"{tmp_path}/curated/pairs"))
    assert [d.images[0].caption for d in documents] == [f"number {n}" for n in range(60)]
    assert [d.text for d in documents] == [f"number {n}" for n in range(60)]
    assert {d.source for d in documents} == {"pairs"}
    assert 0 < sum(isinstance(d.segments[0], Image) for d in documents) < 60

    assert list(read_documents(f"{tmp_path}/curated")) == [*documents, *read_documents(f"{tmp_path}/curated/text")]
    assert manifest == Manifest.read(f"{tmp_path}/curated")
    assert [entry.rows for entry in Manifest.read(f"{tmp_path}/curated/pairs").files] == [25, 5, 25, 5]
    for folder in ("", "/pairs", "/text"):
        Manifest.read(f"{tmp_path}/curated{folder}").verify(f"{tmp_path}/curated{folder}", content=True)

    report = manifest.report["sources"]["pairs"]
    assert (report["read"], report["kept"], report["dropped"], report["bad"], report["images"]) == (60, 60, {}, 0, 60)
    assert recorder.metrics["pairs/kept"] == 60
    assert recorder.metrics["text/kept"] == 30
    sheet = recorder.images["samples/pairs.png"]
    assert len(recorder.images) == 1
    assert (np.asarray(sheet) == (7, 0, 99)).all(axis=-1).sum() == 72 * 72  # the eighth picture, at its size


def test_equal_specifications_make_equal_bytes(tmp_path: Path, here: list[str]) -> None:
    for name in ("one", "two"):
        raw(tmp_path / name)
        run_curate(curation(tmp_path / name))
    one, two = (
        {name.rpartition("-")[2]: data for name, data in files_below(tmp_path / n / "curated/pairs").items()}
        for n in ("one", "two")
    )
    one.pop(MANIFEST), two.pop(MANIFEST)
    assert one == two
    assert one


def test_bad_input_is_skipped_counted_and_named(
    tmp_path: Path, here: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    raw(tmp_path)
    write_tar(tmp_path / "raw/pairs/c.tar", [*pair(100), *pair(101, b"no image"), *pair(102)])
    whole = (tmp_path / "raw/pairs/b.tar").read_bytes()
    (tmp_path / "raw/pairs/b.tar").write_bytes(whole[:20_000])
    manifest, recorder = run_curate(curation(tmp_path, max_bad_share=0.1))

    captions = [d.images[0].caption for d in read_documents(f"{tmp_path}/curated/pairs")]
    kept = len(captions) - 32  # of b.tar, which is cut
    assert captions == [f"number {n}" for n in [*range(30 + kept), 100, 102]]
    assert 0 < kept < 30
    report = manifest.report["sources"]["pairs"]
    assert report["bad"] == recorder.metrics["pairs/bad"] == 2
    assert report["bad_share"] == 2 / (len(captions) + 2)
    truncated, unreadable = report["bad_inputs"]
    assert truncated["name"].startswith(f"{tmp_path}/raw/pairs/b.tar")
    assert "breaks off" in truncated["reason"]
    assert unreadable["name"] == f"{tmp_path}/raw/pairs/c.tar: 0101.png"

    (warning,) = caplog.messages
    first, *named = warning.splitlines()
    assert first == "source 'pairs': 2 unreadable, skipped:"
    assert named == [f"  {bad['name']}: {bad['reason']}" for bad in (truncated, unreadable)]


def test_a_message_about_bad_input_names_the_first_of_it() -> None:
    report = {"bad": 300, "bad_inputs": [{"name": f"a.tar: {n}.png", "reason": "torn"} for n in range(200)]}
    told = curate.unreadable("pairs", report)
    assert told is not None
    assert told.splitlines()[5:] == ["  a.tar: 4.png: torn", "  and 295 more (see bad_inputs in the source's manifest)"]
    assert curate.unreadable("pairs", {"bad": 0, "bad_inputs": []}) is None


def test_too_much_bad_input_publishes_nothing_of_that_source(tmp_path: Path, here: list[str]) -> None:
    raw(tmp_path)
    write_tar(tmp_path / "raw/pairs/c.tar", pair(101, b"no image"))
    with pytest.raises(TooMuchBadInput) as error:
        run_curate(curation(tmp_path))
    assert "source 'pairs': 1.64% of the input is unreadable (1 bad, 60 read)" in str(error.value)
    assert "max_bad_share allows (1.00%)" in str(error.value)
    assert f"{tmp_path}/raw/pairs/c.tar: 0101.png: not a readable image" in str(error.value)
    assert not files_below(tmp_path / "curated/pairs")
    assert Manifest.find(f"{tmp_path}/curated") is None

    # The other source stands: mending the bad file leads to work on this one only.
    (tmp_path / "raw/pairs/c.tar").unlink()
    here.clear()
    manifest, _ = run_curate(curation(tmp_path))
    assert set(here) == {"pairs"}
    assert set(manifest.report["sources"]) == {"pairs", "text"}


def test_a_file_that_cannot_be_read_at_all_counts_by_its_bytes(tmp_path: Path, here: list[str]) -> None:
    raw(tmp_path)
    size = sum(p.stat().st_size for p in (tmp_path / "raw/pairs").iterdir())
    (tmp_path / "raw/pairs/c.tar").write_bytes(b"\xff" * size)
    with pytest.raises(TooMuchBadInput, match=r"50\.00% of the input is unreadable \(1 bad, 60 read\)"):
        run_curate(curation(tmp_path, max_bad_share=0.4))


def test_a_source_without_documents_is_an_error(tmp_path: Path, here: list[str]) -> None:
    raw(tmp_path)
    with pytest.raises(TooMuchBadInput, match=r"'text': no document is left of 30 read \(30 shorter than 9999"):
        run_curate(curation(tmp_path, min_text=9999))


def test_a_changed_specification_replaces_what_was_published(tmp_path: Path, here: list[str]) -> None:
    raw(tmp_path)
    run_curate(curation(tmp_path))
    before = set(files_below(tmp_path / "curated/pairs"))
    run_curate(curation(tmp_path, documents_per_shard=7))
    after = set(files_below(tmp_path / "curated/pairs"))
    assert before & after == {MANIFEST}
    assert {entry.path for entry in Manifest.read(f"{tmp_path}/curated/pairs").files} == after - {MANIFEST}


def test_a_published_source_is_kept_unless_a_file_of_it_is_gone(tmp_path: Path, here: list[str]) -> None:
    raw(tmp_path)
    manifest, _ = run_curate(curation(tmp_path))
    here.clear()
    assert run_curate(curation(tmp_path))[0] == manifest
    assert here == []
    (tmp_path / "curated" / manifest.files[-1].path).unlink()
    assert run_curate(curation(tmp_path))[0] == manifest
    assert here == ["text"]


def test_changed_input_is_curated_again_and_no_other_file_is_touched(tmp_path: Path, here: list[str]) -> None:
    raw(tmp_path)
    # The source's output is where its input is: shards come beside it.
    spec = curation(tmp_path, output="raw")
    run_curate(spec)
    (tmp_path / "raw" / MANIFEST).unlink()
    write_tar(tmp_path / "raw/pairs/c.tar", pair(100))
    here.clear()
    manifest, _ = run_curate(spec)
    assert set(here) == {"pairs"}
    assert manifest.report["sources"]["pairs"]["kept"] == 61
    kept = {entry.path for entry in Manifest.read(f"{tmp_path}/raw/pairs").files}
    assert set(files_below(tmp_path / "raw/pairs")) == {"a.tar", "b.tar", "c.tar", MANIFEST, *kept}


@pytest.mark.parametrize(
    ("location", "said"),
    [
        ("raw/nowhere", "there is nothing at that location"),
        ("raw/other", r"there are 1 other files, such as notes\.md"),
    ],
)
def test_a_source_without_files_says_what_is_there(tmp_path: Path, location: str, said: str) -> None:
    raw(tmp_path)
    (tmp_path / "raw/other").mkdir()
    (tmp_path / "raw/other/notes.md").write_text("x")
    source = {"name": "digits", "format": "webdataset", "location": location}
    with pytest.raises(SpecificationError, match=rf"source 'digits' \(webdataset\): no \*\.tar files at .*{said}"):
        run_curate(curation(tmp_path, sources=[source]))


# -- tokenize ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizers")
    (folder / "text").mkdir()
    (folder / "image").mkdir()
    texts = [f"number {n} more words of text {n}" for n in range(200)]
    train_text_tokenizer(texts, folder / "text", 300, CODES)
    small = ImageTokenizerConfig(
        resolution=8, codebook_size=CODES, embedding=4, base_channels=4, multipliers=[1, 1], residual_blocks=1
    )
    ImageTokenizer(small).save(folder / "image")
    return folder


@pytest.fixture
def encoder(tokenizers: Path) -> DocumentEncoder:
    text = tokenizers / "text"
    return DocumentEncoder(
        Vocabulary.read(text), TextTokenizer.read(text), ImageTokenizer.read(tokenizers / "image", "cpu")
    )


def tokenization(root: Path, tokenizers: Path, **fields: Any) -> TokenizeSpecification:
    values: dict[str, Any] = {
        "storage": str(root),
        "documents": ["curated/pairs", "curated/text"],
        "text_tokenizer": str(tokenizers / "text"),
        "image_tokenizer": str(tokenizers / "image"),
        "context": CONTEXT,
        "micro_batch": 4,
        "micro_batches_per_shard": 2,
        **fields,
    }
    return TokenizeSpecification.model_validate(values)


def run_tokenize(spec: TokenizeSpecification) -> tuple[Manifest, Recorder]:
    recorder = Recorder()
    return tokenize.run(spec, recorder, silent), recorder  # type: ignore[arg-type]


def publish(uri: str, documents: list[Document]) -> None:
    """A curated directory of these documents, in one shard."""
    data = shards.to_parquet(documents)
    Path(uri).mkdir(parents=True, exist_ok=True)
    Path(uri, "documents.parquet").write_bytes(data)
    images = sum(len(document.images) for document in documents)
    entry = FileEntry.of("documents.parquet", data, rows=len(documents))
    Manifest(kind=shards.CURATED, files=[entry], report={"images": images}).write(uri)


def rows_of(uri: str) -> list[dict[str, Any]]:
    return [row for entry in Manifest.read(uri).files for row in pq.read_table(f"{uri}/{entry.path}").to_pylist()]


def documents_in(rows: list[dict[str, Any]]) -> list[list[int]]:
    """Token ids of every document of some rows."""
    found = []
    for row in rows:
        tokens, segments = np.array(row["tokens"]), np.array(row["segments"])
        found += [tokens[segments == n].tolist() for n in range(segments.max() + 1)]
    return found


def test_every_curated_document_is_in_the_shards_once(
    tmp_path: Path, here: list[str], tokenizers: Path, encoder: DocumentEncoder
) -> None:
    raw(tmp_path)
    run_curate(curation(tmp_path))
    manifest, recorder = run_tokenize(tokenization(tmp_path, tokenizers))
    uri = f"{tmp_path}/tokens/pairs"
    rows = rows_of(uri)
    expected = [e.ids for e in encoder.encode_many(list(read_documents(f"{tmp_path}/curated/pairs")))]
    assert sorted(documents_in(rows)) == sorted(expected)
    assert documents_in(rows) != expected  # shuffled

    report = Manifest.read(uri).report
    padding = sum(row["segments"].count(-1) for row in rows)
    assert report == manifest.report["sources"]["pairs"]
    assert (report["documents"], report["split"], report["dropped"], report["longer_than_context"]) == (60, 0, {}, 0)
    assert report["padding_share"] == padding / (len(rows) * (CONTEXT + 1)) == recorder.metrics["pairs/padding_share"]
    assert report["trained"] == sum(sum(row["loss_mask"] or [True] * (CONTEXT + 1)) for row in rows)
    assert report["trained"] == sum(map(len, expected))
    assert report["tokens"]["image"] == 60 * (IMAGE_LENGTH - 2)
    assert sum(report["tokens"].values()) == sum(map(len, expected))


def test_a_row_group_is_a_micro_batch(tmp_path: Path, here: list[str], tokenizers: Path) -> None:
    raw(tmp_path)
    run_curate(curation(tmp_path))
    run_tokenize(tokenization(tmp_path, tokenizers))
    uri = f"{tmp_path}/tokens/pairs"
    manifest = Manifest.read(uri)
    manifest.verify(uri, content=True)
    assert len(manifest.files) > 1
    for entry in manifest.files:
        metadata = pq.ParquetFile(f"{uri}/{entry.path}").metadata
        groups = [metadata.row_group(n).num_rows for n in range(metadata.num_row_groups)]
        assert groups == [entry.sequences(n) for n in range(entry.row_groups)]
        assert metadata.row_group(0).column(0).compression == "ZSTD"
    for row in rows_of(uri):
        assert len(row["tokens"]) == len(row["segments"]) == CONTEXT + 1
        assert row["loss_mask"] is None or row["loss_mask"] == [s >= 0 for s in row["segments"]]


def test_long_pages_are_split_and_long_conversations_dropped(
    tmp_path: Path, here: list[str], tokenizers: Path, encoder: DocumentEncoder
) -> None:
    long = "more words of text " * 40
    page = Document((Text(long), Image(png(1)), Text(long)))
    chat = Document((Text("number 1", "user"), Text("number 2", "assistant")))
    endless = Document((Text("number 1", "user"), Text(long, "assistant")))
    publish(f"{tmp_path}/curated/mixed", [page, chat, endless])
    manifest, _ = run_tokenize(tokenization(tmp_path, tokenizers, documents=["curated/mixed"]))

    report = manifest.report["sources"]["mixed"]
    assert (report["documents"], report["split"], report["longer_than_context"]) == (3, 1, 2)
    assert report["dropped"] == {"conversation longer than the context": 1}
    rows = rows_of(f"{tmp_path}/tokens/mixed")
    vocabulary = encoder.vocabulary
    for piece in documents_in(rows):
        assert piece.count(vocabulary.begin_image) == piece.count(vocabulary.end_image)
    lengths = sorted(map(len, documents_in(rows)))
    assert sum(lengths) == len(encoder.encode(page).ids) + len(encoder.encode(chat).ids)

    encoded = encoder.encode(chat)
    (found,) = (row for row in rows if encoded.ids in documents_in([row]))
    number = documents_in([found]).index(encoded.ids)
    mask = [m for m, s in zip(found["loss_mask"], found["segments"], strict=True) if s == number]
    assert mask == encoded.trained
    assert True in mask
    assert False in mask


def test_tokens_are_the_same_for_one_seed_and_others_for_another(
    tmp_path: Path, here: list[str], tokenizers: Path
) -> None:
    raw(tmp_path)
    run_curate(curation(tmp_path))
    outputs = []
    for output, seed in (("one", 0), ("two", 0), ("three", 1)):
        run_tokenize(tokenization(tmp_path, tokenizers, documents=["curated/pairs"], output=output, seed=seed))
        outputs.append(rows_of(f"{tmp_path}/{output}/pairs"))
    assert outputs[0] == outputs[1]
    assert outputs[0] != outputs[2]
    assert sorted(documents_in(outputs[0])) == sorted(documents_in(outputs[2]))


def test_only_directories_whose_documents_changed_are_tokenized_again(
    tmp_path: Path, here: list[str], tokenizers: Path
) -> None:
    raw(tmp_path)
    run_curate(curation(tmp_path))
    first, _ = run_tokenize(tokenization(tmp_path, tokenizers))
    here.clear()
    assert run_tokenize(tokenization(tmp_path, tokenizers))[0] == first
    assert here == []
    publish(f"{tmp_path}/curated/text", [Document((Text("number 5"),))])
    run_tokenize(tokenization(tmp_path, tokenizers))
    assert here == ["text"]
    assert len(files_below(tmp_path / "tokens/text")) == 2  # the shard and the manifest: what it replaced is gone


def test_a_context_shorter_than_an_image_is_refused_before_any_work(
    tmp_path: Path, here: list[str], tokenizers: Path
) -> None:
    raw(tmp_path)
    run_curate(curation(tmp_path))
    here.clear()
    with pytest.raises(SpecificationError, match=r"context: 16 is too short for the 18 tokens .* 60 images; .* 17"):
        run_tokenize(tokenization(tmp_path, tokenizers, context=16))
    run_tokenize(tokenization(tmp_path, tokenizers, context=16, documents=["curated/text"]))
    assert here == ["text"]


def test_missing_or_unequal_tokenizers_and_documents_are_named(
    tmp_path: Path, here: list[str], tokenizers: Path
) -> None:
    publish(f"{tmp_path}/curated/a", [Document((Text("number 1"),))])

    def refused(**fields: Any) -> str:
        with pytest.raises(SpecificationError) as error:
            run_tokenize(tokenization(tmp_path, tokenizers, **{"documents": ["curated/a"], **fields}))
        return str(error.value)

    assert "run the job train_text_tokenizer first" in refused(text_tokenizer="nowhere")
    assert "run the job train_image_tokenizer first" in refused(image_tokenizer="nowhere")
    assert "run the job curate for them first" in refused(documents=["curated/b"])
    config = ImageTokenizerConfig(resolution=8, codebook_size=CODES + 1, multipliers=[1, 1])
    (tmp_path / "other").mkdir()
    config.save(tmp_path / "other")
    assert "has ids for 8 image codes, and the image tokenizer" in refused(image_tokenizer="other")


def test_tokens_are_not_taken_for_documents(tmp_path: Path, here: list[str], tokenizers: Path) -> None:
    publish(f"{tmp_path}/curated/a", [Document((Text("number 1"),))])
    run_tokenize(tokenization(tmp_path, tokenizers, documents=["curated/a"]))
    with pytest.raises(SpecificationError, match="holds 'tokens', not curated documents"):
        next(read_documents(f"{tmp_path}/tokens/a"))


def test_documents_that_all_are_too_long_are_an_error(tmp_path: Path, here: list[str], tokenizers: Path) -> None:
    endless = Document((Text("number 1", "user"), Text("more words " * 90, "assistant")))
    publish(f"{tmp_path}/curated/a", [endless])
    with pytest.raises(DocumentsUnusable, match="1 conversation longer than the context"):
        run_tokenize(tokenization(tmp_path, tokenizers, documents=["curated/a"]))
    assert Manifest.find(f"{tmp_path}/tokens/a") is None


def test_documents_and_tokens_may_be_in_s3(
    tmp_path: Path, here: list[str], tokenizers: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw(tmp_path)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.setenv(name, "test")
        monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        boto3.client("s3").create_bucket(Bucket="data")
        remote = "s3://data/project"
        storage.upload(tmp_path / "raw", f"{remote}/raw")
        storage.upload(tokenizers, f"{remote}/tokenizers")
        run_curate(curation(tmp_path, storage=remote))
        tokenized = {"text_tokenizer": "tokenizers/text", "image_tokenizer": "tokenizers/image"}
        manifest, _ = run_tokenize(tokenization(tmp_path, tokenizers, storage=remote, **tokenized))
        manifest.verify(f"{remote}/tokens", content=True)
        assert len(list(read_documents(f"{remote}/curated"))) == 90
    finally:
        server.stop()
    run_curate(curation(tmp_path))
    local, _ = run_tokenize(tokenization(tmp_path, tokenizers))
    assert [entry.sha256 for entry in manifest.files] == [entry.sha256 for entry in local.files]


@given(st.integers(1, 40), st.integers(1, 5000), st.integers(0, 9))
def test_windows_deal_every_shard_once(count: int, rows: int, seed: int) -> None:
    uris = [str(n) for n in range(count)]
    dealt = windows(uris, count * rows, seed)
    assert sorted(uri for window in dealt for uri in window) == sorted(uris)
    assert all(dealt)
    assert len(dealt) == min(count, max(1, count * rows // 1000))


# -- both jobs on the cluster ------------------------------------------------------------------------------------------


@pytest.mark.cluster
def test_the_cluster_makes_what_this_process_makes(
    ray_cluster: None, tmp_path: Path, tokenizers: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    local, remote = tmp_path / "local", tmp_path / "remote"
    raw(local)
    raw(remote)
    # One more bad input than allowed: a failing source names it.
    write_tar(remote / "raw/pairs/c.tar", pair(101, b"no image"))
    with pytest.raises(TooMuchBadInput, match=r"c\.tar: 0101\.png: not a readable image"):
        run_curate(curation(remote))
    (remote / "raw/pairs/c.tar").unlink()

    notes: list[tuple[float, float]] = []
    run_curate(curation(remote))
    spec = tokenization(remote, tokenizers)
    tokenize.run(spec, Recorder(), lambda done, total, note="": notes.append((done, total)))  # type: ignore[arg-type]
    assert notes == sorted(notes)
    assert notes[-1] == (90, 90)

    # What an actor raises reaches the caller as it was raised.
    broken = Document((Image(b"no image", "x"), Text("x")))
    publish(f"{remote}/curated/broken", [broken])
    with pytest.raises(DocumentsUnusable, match=r"curated/broken/documents\.parquet: a document cannot be encoded"):
        run_tokenize(tokenization(remote, tokenizers, documents=["curated/broken"]))

    run_here(monkeypatch)
    run_curate(curation(local))
    run_tokenize(tokenization(local, tokenizers))
    for name in ("pairs", "text"):
        assert rows_of(f"{remote}/tokens/{name}") == rows_of(f"{local}/tokens/{name}")
