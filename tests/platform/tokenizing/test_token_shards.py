"""Curated documents -> token shards: every document once, in row groups that carry checksums."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as PILImage

from calumma.model.document import Document, Image, Segment, Text
from calumma.model.encoding import DocumentEncoder, EncodedArrays
from calumma.model.tokenizers.image import ImageTokenizer
from calumma.model.tokenizers.text import TextTokenizer
from calumma.model.vocabulary import Vocabulary
from calumma.platform import storage
from calumma.platform.shards import documents as document_shards
from calumma.platform.shards import tokens as token_shards
from calumma.platform.shards.documents import read_documents
from calumma.platform.storage.manifest import Manifest
from calumma.platform.tokenizing import actor, tokenize
from calumma.platform.tokenizing.packing import pack

from .conftest import CONTEXT, IMAGE_LENGTH, Recorder, curated, documents_in, png, publish, rows_of, run, tokenization


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


@pytest.mark.parametrize("known", [1000, 2])
def test_equal_pictures_are_coded_once_while_they_are_known(
    tmp_path: Path, encoder: DocumentEncoder, monkeypatch: pytest.MonkeyPatch, known: int
) -> None:
    wide = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (16, 64), dtype=np.uint8)
    PILImage.fromarray(noise).save(wide, "PNG")  # a prompt's is padded, another one is cut
    pictures = [Image(png(n % 4)) for n in range(40)] + [Image(wide.getvalue())]
    documents = [Document((picture,)) for picture in pictures]
    documents.append(Document((Image(wide.getvalue(), None, "user"), Text("a", "assistant"))))
    uri = str(tmp_path / "a.parquet")
    data = document_shards.to_parquet(documents)
    storage.write_bytes(uri, data)
    coded = list[int]()
    code = encoder.code
    monkeypatch.setattr(encoder, "code", lambda pixels: coded.append(len(pixels)) or code(pixels))
    monkeypatch.setattr(actor, "KNOWN_IMAGES", known)
    found = list(actor.encode_documents(encoder, [(uri, hashlib.sha256(data).hexdigest())], 3, 1))
    assert sum(coded) == (4 + 2 if known > 2 else 40 + 2)
    monkeypatch.undo()
    assert [tokens.ids.tolist() for _, tokens in found] == [encoder.encode(document).ids for document in documents]
    codes = [[n for n in tokens.ids if n in encoder.vocabulary.code_of] for _, tokens in found[-2:]]
    assert codes[0] != codes[1]


def test_what_waits_for_few_pictures_is_not_the_whole_window(tmp_path: Path, encoder: DocumentEncoder) -> None:
    documents = [Document((Image(png(n % 3)),)) for n in range(4000)]
    uri = str(tmp_path / "a.parquet")
    data = document_shards.to_parquet(documents)
    storage.write_bytes(uri, data)
    read = list[Document]()

    def reading(*given: Any) -> Iterator[Document]:
        for document in read_shard(*given):
            read.append(document)
            yield document

    read_shard = document_shards.read_shard
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(document_shards, "read_shard", reading)
        found = actor.encode_documents(encoder, [(uri, hashlib.sha256(data).hexdigest())], 16, 1)
        ahead = [len(read) - number for number, _ in enumerate(found)]
    assert len(ahead) == 4000
    assert max(ahead) <= 4 * 16 + 2 * actor.LEAST_DOCUMENTS


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
