"""Curated documents -> token shards: every document once, in row groups that carry checksums; what is reported; and
that a rerun makes the same. What happens to a job that is killed is in test_tokenize_restart.py.

All but the last test run without a cluster (`resources.workers: 0`).
"""

from __future__ import annotations

import hashlib
import io
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as PILImage

from calumma.model.config import ImageTokenizerConfig
from calumma.model.document import Document, Image, Segment, Text
from calumma.model.encoding import DocumentEncoder, EncodedArrays
from calumma.model.tokenizers.image import ImageTokenizer
from calumma.model.tokenizers.text import TextTokenizer
from calumma.model.tokenizers.text_training import train_text_tokenizer
from calumma.model.vocabulary import Vocabulary
from calumma.platform import storage
from calumma.platform.cluster.progress import no_progress
from calumma.platform.shards import documents as document_shards
from calumma.platform.shards import tokens as token_shards
from calumma.platform.shards.documents import read_documents
from calumma.platform.specification import SpecificationError, validate
from calumma.platform.storage.manifest import FileEntry, Manifest
from calumma.platform.tokenizing import actor, tokenize
from calumma.platform.tokenizing.actor import UnusableDocuments
from calumma.platform.tokenizing.packing import pack
from calumma.platform.tokenizing.specification import TokenizeSpecification

CODES = 8  # entries of the tests' codebook; an image is 4x4 of them
IMAGE_LENGTH = 16 + 2
CONTEXT = 63


class Recorder:
    """What a job logs."""

    def __init__(self) -> None:
        self.metrics: dict[str, float] = {}

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.metrics |= metrics


def png(shade: int) -> bytes:
    buffer = io.BytesIO()
    PILImage.new("RGB", (8, 8), (shade % 256, shade // 256, 99)).save(buffer, "PNG")
    return buffer.getvalue()


def pair(number: int) -> Document:
    image, caption = Image(png(number), f"number {number}"), Text(f"number {number}")
    return Document((image, caption) if number % 2 else (caption, image), source="pairs")


def publish(uri: str, documents: list[Document], a_shard: int = 1000) -> None:
    """A curated directory of these documents."""
    entries = []
    for number in range(0, len(documents), a_shard):
        data = document_shards.to_parquet(part := documents[number : number + a_shard])
        path = f"documents-{number:04d}.parquet"
        storage.write_bytes(storage.join(uri, path), data)
        entries.append(FileEntry.from_bytes(path, data, rows=len(part)))
    images = sum(len(document.images) for document in documents)
    Manifest(kind=document_shards.CURATED, files=entries, report={"images": images}).write(uri)


def curated(root: Path | str) -> None:
    """Two directories: 60 pairs in four shards, and 30 texts of growing length in two."""
    publish(f"{root}/curated/pairs", [pair(n) for n in range(60)], 15)
    texts = [Document((Text(f"text {n}: " + "more words " * n),)) for n in range(30)]
    publish(f"{root}/curated/text", texts, 15)


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


@pytest.fixture
def worked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the directories that windows were made of, one for each window."""
    names: list[str] = []
    work = actor.TokenizingActor.__call__

    def noted(self: actor.TokenizingActor, task: dict[str, Any]) -> dict[str, Any]:
        names.append(Path(task["output"]).name)
        return work(self, task)

    monkeypatch.setattr(actor.TokenizingActor, "__call__", noted)
    return names


def tokenization(root: Path | str, tokenizers: Path, **fields: Any) -> TokenizeSpecification:
    values: dict[str, Any] = {
        "job": "tokenize",
        "storage": str(root),
        "documents": ["curated/pairs", "curated/text"],
        "text_tokenizer": str(tokenizers / "text"),
        "image_tokenizer": str(tokenizers / "image"),
        "context": CONTEXT,
        "micro_batch": 4,
        "micro_batches_per_shard": 2,
        "resources": {"workers": 0},
        **fields,
    }
    return validate(TokenizeSpecification, values, "the test")


def run(spec: TokenizeSpecification) -> tuple[Manifest, Recorder]:
    recorder = Recorder()
    return tokenize.run(spec, recorder, no_progress), recorder  # type: ignore[arg-type]


def files_below(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def rows_of(uri: str) -> list[dict[str, Any]]:
    return [row for entry in Manifest.read(uri).files for row in pq.read_table(f"{uri}/{entry.path}").to_pylist()]


def documents_in(rows: list[dict[str, Any]]) -> list[list[int]]:
    """Token ids of every document of some rows."""
    found = []
    for row in rows:
        tokens, segments = np.array(row["tokens"]), np.array(row["segments"])
        found += [tokens[segments == n].tolist() for n in range(segments.max() + 1)]
    return found


# -- what is in the shards ---------------------------------------------------------------------------------------------


def test_every_curated_document_is_in_the_shards_once(
    tmp_path: Path, tokenizers: Path, encoder: DocumentEncoder
) -> None:
    curated(tmp_path)
    manifest, recorder = run(tokenization(tmp_path, tokenizers))
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
    assert report["trained"] == sum(map(len, expected))
    assert report["tokens"]["image"] == 60 * (IMAGE_LENGTH - 2)
    assert sum(report["tokens"].values()) == sum(map(len, expected))


def test_a_row_group_is_a_micro_batch(tmp_path: Path, tokenizers: Path) -> None:
    curated(tmp_path)
    run(tokenization(tmp_path, tokenizers))
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
        assert row["loss_mask"] is None, "of pairs everything but padding is trained"


def test_every_byte_of_a_shard_that_a_reader_of_row_groups_fetches_has_a_checksum(
    tmp_path: Path, tokenizers: Path
) -> None:
    curated(tmp_path)
    run(tokenization(tmp_path, tokenizers, micro_batches_per_shard=3))
    uri = f"{tmp_path}/tokens/pairs"
    for entry in Manifest.read(uri).files:
        data = Path(uri, entry.path).read_bytes()
        footer = token_shards.footer_digest(data)
        assert entry.footer == footer
        metadata = pq.ParquetFile(io.BytesIO(data)).metadata
        assert footer.bytes == metadata.serialized_size + 8
        groups = json.loads(metadata.metadata[token_shards.ROW_GROUPS_KEY])
        assert len(groups) == entry.row_groups == metadata.num_row_groups
        end = len(b"PAR1")
        for number, (offset, length, digest) in enumerate(groups):
            columns = [metadata.row_group(number).column(c) for c in range(3)]
            assert (offset, length) == (columns[0].data_page_offset, sum(c.total_compressed_size for c in columns))
            assert offset == end
            assert digest == token_shards.row_group_digest(data[offset : offset + length])
            end = offset + length
        assert end + footer.bytes == len(data)


@given(st.lists(st.booleans(), max_size=300), st.integers(1, 20_000))
def test_shards_of_documents_hold_few_images_and_many_texts_in_a_row_group(
    tmp_path_factory: pytest.TempPathFactory, with_image: list[bool], length: int
) -> None:
    documents = [
        Document((Image(b"an image"),)) if image else Document((Text(f"{n} " * length),))
        for n, image in enumerate(with_image)
    ]
    uri = str(tmp_path_factory.mktemp("documents") / "a.parquet")
    storage.write_bytes(uri, document_shards.to_parquet(documents))
    assert list(document_shards.read_shard(uri)) == documents
    metadata = pq.ParquetFile(uri).metadata
    groups = [metadata.row_group(n).num_rows for n in range(metadata.num_row_groups)]
    ends = np.cumsum([0, *groups])
    for begin, end in pairwise(ends):
        group = documents[begin:end]
        assert len(group) <= 64 or not any(d.images for d in group[:-1])
        assert sum(len(d.text) for d in group[:-1]) <= document_shards.ROW_GROUP_CHARACTERS or len(group) <= 64
    if sum(len(d.text) for d in documents) < document_shards.ROW_GROUP_CHARACTERS and not any(with_image):
        assert len(groups) == (1 if documents else 0)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=20), st.booleans(), st.integers(1, 5))
def test_rows_survive_the_file(sizes: list[int], trained: bool, micro_batch: int) -> None:
    def tokens(size: int) -> EncodedArrays:
        return EncodedArrays(np.arange(size, dtype=np.int32), np.full(size, trained))

    rows = pack([tokens(size) for size in sizes], 40, 1)
    table = pq.read_table(io.BytesIO(token_shards.to_parquet(rows, micro_batch))).to_pylist()
    assert [(r["tokens"], r["segments"]) for r in table] == [(r.tokens.tolist(), r.segments.tolist()) for r in rows]
    masks = [None if r.loss_mask is None else r.loss_mask.tolist() for r in rows]
    assert [r["loss_mask"] for r in table] == masks


def test_long_pages_are_split_and_long_conversations_dropped(
    tmp_path: Path, tokenizers: Path, encoder: DocumentEncoder
) -> None:
    long = "more words of text " * 40
    page = Document((Text(long), Image(png(1)), Text(long)))
    chat = Document((Text("number 1", "user"), Text("number 2", "assistant")))
    endless = Document((Text("number 1", "user"), Text(long, "assistant")))
    publish(f"{tmp_path}/curated/mixed", [page, chat, endless])
    notes: list[str] = []
    recorder = Recorder()
    spec = tokenization(tmp_path, tokenizers, documents=["curated/mixed"])
    manifest = tokenize.run(spec, recorder, lambda done, total, note="": notes.append(note))  # type: ignore[arg-type]

    report = manifest.report["sources"]["mixed"]
    assert (report["documents"], report["split"], report["longer_than_context"]) == (3, 1, 2)
    assert report["dropped"] == {"conversation longer than the context": 1}
    assert report["truncated_share"] == recorder.metrics["mixed/truncated_share"] == 2 / 3
    assert notes[-1] == f"mixed: {report['padding_share']:.1%} padding, 66.7% of the documents longer than the context"
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


texts = st.sampled_from(["number 1", "more words ", "text ▁ \0", ""]).map(Text)
pictures = st.integers(0, 300).map(lambda shade: Image(png(shade)))
answers = st.lists(
    st.sampled_from([Text("a", "user"), Text("b", "assistant"), Image(png(3), None, "user")]), max_size=4
)
pages: st.SearchStrategy[list[Segment]] = st.lists(texts | pictures, max_size=5)


@settings(max_examples=30)
@given(st.lists(pages | answers, min_size=1, max_size=90), st.integers(1, 9), st.integers(1, 3))
def test_documents_meet_their_own_texts_and_images_again(
    tmp_path_factory: pytest.TempPathFactory, tokenizers: Path, given: list[list[Segment]], batch: int, threads: int
) -> None:
    text = tokenizers / "text"
    encoder = DocumentEncoder(
        Vocabulary.read(text), TextTokenizer.read(text), ImageTokenizer.read(tokenizers / "image", "cpu")
    )
    documents = [Document(tuple(segments)) for segments in given]
    uri = str(tmp_path_factory.mktemp("documents") / "a.parquet")
    data = document_shards.to_parquet(documents)
    storage.write_bytes(uri, data)
    shard = uri, hashlib.sha256(data).hexdigest()
    found = list(actor.encode_documents(encoder, [shard, shard], batch, threads))
    assert [document for document, _ in found] == documents * 2
    expected = [encoder.encode(document) for document in documents] * 2
    assert [(tokens.ids.tolist(), tokens.trained.tolist()) for _, tokens in found] == expected


@given(st.lists(st.integers(1, 20_000) | st.none(), max_size=300))
def test_few_images_and_many_short_texts_are_encoded_together(lengths: list[int | None]) -> None:
    documents = [Document((Text("a" * n) if n else Image(b"an image"),)) for n in lengths]
    chunks = list(actor._batches(iter(documents)))
    assert [document for chunk in chunks for document in chunk] == documents
    assert all(len(chunk) >= actor.LEAST_DOCUMENTS for chunk in chunks[:-1])
    for chunk in chunks:
        before = chunk[:-1]
        if len(before) >= actor.LEAST_DOCUMENTS:
            assert not any(document.images for document in before)
            assert sum(len(document.text) for document in before) < actor.LEAST_CHARACTERS


# -- the job -----------------------------------------------------------------------------------------------------------


def test_tokens_are_the_same_for_one_seed_and_others_for_another(tmp_path: Path, tokenizers: Path) -> None:
    curated(tmp_path)
    outputs = []
    for output, seed in (("one", 0), ("two", 0), ("three", 1)):
        run(tokenization(tmp_path, tokenizers, documents=["curated/pairs"], output=output, seed=seed))
        outputs.append(rows_of(f"{tmp_path}/{output}/pairs"))
    assert outputs[0] == outputs[1]
    assert outputs[0] != outputs[2]
    assert sorted(documents_in(outputs[0])) == sorted(documents_in(outputs[2]))


def test_only_directories_whose_documents_changed_are_tokenized_again(
    tmp_path: Path, worked: list[str], tokenizers: Path
) -> None:
    curated(tmp_path)
    first, _ = run(tokenization(tmp_path, tokenizers))
    worked.clear()
    assert run(tokenization(tmp_path, tokenizers))[0] == first
    assert worked == []
    publish(f"{tmp_path}/curated/text", [Document((Text("number 5"),))])
    run(tokenization(tmp_path, tokenizers))
    assert worked == ["text"]
    assert len(files_below(tmp_path / "tokens/text")) == 2  # the shard and the manifest: what it replaced is gone


def test_a_context_shorter_than_an_image_is_refused_before_any_work(
    tmp_path: Path, worked: list[str], tokenizers: Path
) -> None:
    curated(tmp_path)
    with pytest.raises(SpecificationError, match=r"context: 16 is too short for the 18 tokens .* 60 images; .* 17"):
        run(tokenization(tmp_path, tokenizers, context=16))
    run(tokenization(tmp_path, tokenizers, context=16, documents=["curated/text"]))
    assert worked == ["text"]


def test_missing_or_unequal_tokenizers_and_documents_are_named(tmp_path: Path, tokenizers: Path) -> None:
    publish(f"{tmp_path}/curated/a", [Document((Text("number 1"),))])

    def refused(**fields: Any) -> str:
        with pytest.raises(SpecificationError) as error:
            run(tokenization(tmp_path, tokenizers, **{"documents": ["curated/a"], **fields}))
        return str(error.value)

    assert "run the job train_text_tokenizer first" in refused(text_tokenizer="nowhere")
    assert "run the job train_image_tokenizer first" in refused(image_tokenizer="nowhere")
    assert "run the job curate for them first" in refused(documents=["curated/b"])
    config = ImageTokenizerConfig(resolution=8, codebook_size=CODES + 1, multipliers=[1, 1])
    (tmp_path / "other").mkdir()
    config.save(tmp_path / "other")
    assert "has ids for 8 image codes, and the image tokenizer" in refused(image_tokenizer="other")
    assert "window: Input should be greater than or equal to 1 (given 0)" in refused(window=0)


def test_only_jobs_that_can_do_without_a_cluster_may_ask_for_no_workers(tmp_path: Path) -> None:
    from calumma.jobs.specifications.table import JOBS
    from calumma.platform.tokenizing.specification import TextTokenizerSpecification

    values = {"storage": str(tmp_path), "documents": ["a"], "resources": {"workers": 0}}
    assert validate(TokenizeSpecification, values, "the test").resources.max_workers == 0
    with pytest.raises(
        SpecificationError, match=r"is for curate, tokenize, .* alone; give train_text_tokenizer at least 1"
    ):
        validate(TextTokenizerSpecification, values, "the test")
    assert {"curate", "tokenize"} < set(JOBS)


def test_tokens_are_not_taken_for_documents(tmp_path: Path, tokenizers: Path) -> None:
    publish(f"{tmp_path}/curated/a", [Document((Text("number 1"),))])
    run(tokenization(tmp_path, tokenizers, documents=["curated/a"]))
    with pytest.raises(SpecificationError, match="holds 'tokens', not curated documents"):
        next(read_documents(f"{tmp_path}/tokens/a"))


def test_documents_that_all_are_too_long_are_an_error(tmp_path: Path, tokenizers: Path) -> None:
    endless = Document((Text("number 1", "user"), Text("more words " * 90, "assistant")))
    publish(f"{tmp_path}/curated/a", [endless])
    with pytest.raises(UnusableDocuments, match="1 conversation longer than the context"):
        run(tokenization(tmp_path, tokenizers, documents=["curated/a"]))
    assert Manifest.find(f"{tmp_path}/tokens/a") is None


def test_documents_that_cannot_be_encoded_are_named_by_their_shard(tmp_path: Path, tokenizers: Path) -> None:
    publish(f"{tmp_path}/curated/a", [pair(1), Document((Image(b"no image"),))])
    with pytest.raises(
        UnusableDocuments, match=r"a/documents-0000\.parquet: .* not a readable image.*; curate it again"
    ):
        run(tokenization(tmp_path, tokenizers, documents=["curated/a"]))


def test_documents_and_tokens_may_be_in_s3(tmp_path: Path, tokenizers: Path, s3: str) -> None:
    curated(s3)
    storage.upload(tokenizers, f"{s3}/tokenizers")
    tokenized = {"text_tokenizer": "tokenizers/text", "image_tokenizer": "tokenizers/image"}
    manifest, _ = run(tokenization(s3, tokenizers, **tokenized))
    manifest.verify(f"{s3}/tokens", content=True)
    assert len(storage.list_files(f"{s3}/tokens")) == len(manifest.files) + 3  # manifests; no receipt is left
    curated(tmp_path)
    local, _ = run(tokenization(tmp_path, tokenizers))
    assert [entry.sha256 for entry in manifest.files] == [entry.sha256 for entry in local.files]


@given(st.integers(1, 40), st.integers(1, 5000), st.integers(1, 3000), st.integers(0, 9))
def test_windows_deal_every_shard_once(count: int, rows: int, size: int, seed: int) -> None:
    uris = [str(n) for n in range(count)]
    dealt = tokenize.windows(uris, count * rows, size, seed)
    assert sorted(uri for window in dealt for uri in window) == sorted(uris)
    assert all(dealt)
    assert len(dealt) == min(count, max(1, count * rows // size))


# -- on the cluster ----------------------------------------------------------------------------------------------------


@pytest.mark.cluster
def test_the_cluster_makes_what_this_process_makes(ray_cluster: None, tmp_path: Path, tokenizers: Path) -> None:
    curated(tmp_path)
    notes: list[tuple[float, float]] = []
    spec = tokenization(
        tmp_path, tokenizers, output="remote", window=15, resources={"workers": 2, "cpus_per_worker": 0.5}
    )

    def progress(done: float, total: float, note: str = "") -> None:
        notes.append((done, total))
        if done and len(notes) == 3:
            raise KeyboardInterrupt

    # Stopped in the middle, it goes on from there.
    with pytest.raises(KeyboardInterrupt):
        tokenize.run(spec, Recorder(), progress)  # type: ignore[arg-type]
    tokenize.run(spec, Recorder(), progress)  # type: ignore[arg-type]
    assert notes[:3] == [(0, 90), (15, 90), (30, 90)]
    assert notes[3] >= (30, 90)
    assert notes[3:] == sorted(notes[3:])
    assert notes[-1] == (90, 90)
    manifest = Manifest.read(f"{tmp_path}/remote")
    manifests = {"manifest.json", "pairs/manifest.json", "text/manifest.json"}
    assert set(files_below(tmp_path / "remote")) == manifests | {entry.path for entry in manifest.files}

    # What an actor raises reaches the caller as it was raised.
    broken = Document((Image(b"no image", "x"), Text("x")))
    publish(f"{tmp_path}/curated/broken", [broken])
    with pytest.raises(
        UnusableDocuments, match=r"curated/broken/documents-0000\.parquet: a document cannot be encoded"
    ):
        run(tokenization(tmp_path, tokenizers, documents=["curated/broken"], resources={"workers": 1}))

    run(tokenization(tmp_path, tokenizers, output="local", window=15))
    for name in ("pairs", "text"):
        assert rows_of(f"{tmp_path}/remote/{name}") == rows_of(f"{tmp_path}/local/{name}")
