"""Curated documents in shards: read as they were written, or an error that names what is damaged."""

from __future__ import annotations

import hashlib
import io
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from calumma.model.document import Document, Image, Text
from calumma.platform import storage
from calumma.platform.shards import documents as document_shards
from calumma.platform.shards.documents import read_documents, read_shard
from calumma.platform.shards.row_groups import ShardError
from calumma.platform.storage.manifest import FileEntry, Manifest


def picture(number: int) -> bytes:
    """No image, but as hard to compress as one; documents are not looked into."""
    return np.random.default_rng(number).bytes(300)


DOCUMENTS = [
    Document((Text(f"number {number} " * 5), Image(picture(number), f"caption {number}")), source="here")
    for number in range(150)
]
GROUPS = 3  # row groups of the shard: documents with images come 64 in one


@pytest.fixture
def directory(tmp_path: Path) -> str:
    """A published directory of one shard."""
    data = document_shards.to_parquet(DOCUMENTS)
    storage.write_bytes(f"{tmp_path}/curated/documents.parquet", data)
    entry = FileEntry.from_bytes("documents.parquet", data, rows=len(DOCUMENTS))
    Manifest(kind=document_shards.CURATED, files=[entry]).write(f"{tmp_path}/curated")
    return f"{tmp_path}/curated"


def flip(uri: str, place: int, bit: int = 0) -> None:
    path = Path(uri)
    data = bytearray(path.read_bytes())
    data[place] ^= 1 << bit
    path.write_bytes(data)


def test_documents_are_read_as_they_were_written(directory: str, s3: str) -> None:
    assert list(read_documents(directory)) == DOCUMENTS
    for file in Path(directory).iterdir():
        storage.write_bytes(f"{s3}/curated/{file.name}", file.read_bytes())
    assert list(read_documents(f"{s3}/curated")) == DOCUMENTS


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7), cut=st.booleans())
def test_no_damage_goes_unnoticed(directory: str, place: float, bit: int, cut: bool) -> None:
    """A bit flipped anywhere, or the end cut off: whoever reads all of it gets an error that names the shard."""
    uri, sha256 = document_shards.shards(directory)[0]
    whole = Path(uri).read_bytes()
    at = int(place * len(whole))
    try:
        if cut:
            Path(uri).write_bytes(whole[:at])
        else:
            flip(uri, at, bit)
        with pytest.raises(ShardError, match=uri):
            list(read_shard(uri, sha256))
    finally:
        Path(uri).write_bytes(whole)


@pytest.mark.parametrize("group", range(GROUPS))
def test_a_row_group_that_cannot_be_read_is_named(directory: str, group: int) -> None:
    """The documents before it are read."""
    uri, sha256 = document_shards.shards(directory)[0]
    metadata = pq.read_metadata(uri)
    assert metadata.num_row_groups == GROUPS
    column = metadata.row_group(group).column(0)
    flip(uri, column.dictionary_page_offset or column.data_page_offset)  # the header of its first page
    seen: list[Document] = []

    def read() -> None:
        for document in read_shard(uri, sha256):
            seen.append(document)

    with pytest.raises(ShardError, match=rf"^{uri}: row group {group} cannot be read \(.*curate its documents again"):
        read()
    assert seen == DOCUMENTS[: 64 * group]


def test_damage_that_can_still_be_read_is_found_at_the_end(directory: str) -> None:
    """A flipped bit of a picture is a picture; it is not the one of the manifest."""
    uri, sha256 = document_shards.shards(directory)[0]
    flip(uri, Path(uri).read_bytes().index(picture(100)))
    assert len(list(islice(read_shard(uri, sha256), len(DOCUMENTS) - 1))) == len(DOCUMENTS) - 1
    with pytest.raises(ShardError, match=rf"^{uri} has checksum .* where its manifest says {sha256[:16]}"):
        list(read_shard(uri, sha256))
    assert len(list(read_shard(uri))) == len(DOCUMENTS)  # nobody says what it should be


def test_small_shards_are_read_from_memory() -> None:
    data = document_shards.to_parquet(DOCUMENTS)
    assert document_shards.from_parquet(data, "here.parquet") == DOCUMENTS
    for damaged in (data[:-100], data[:1000] + b"x" * 500 + data[1500:], b""):
        with pytest.raises(ShardError, match=r"here\.parquet cannot be read"):
            document_shards.from_parquet(damaged, "here.parquet")


def test_what_is_not_trained_is_kept_and_costs_other_shards_nothing(tmp_path: Path) -> None:
    plain = Document((Text("q", "user"), Text("a", "assistant")))
    masked = Document((Text("q", "user"), Text("a", "assistant", trained=False), Image(b"x", None, "assistant", False)))
    for documents, column in (([plain, masked], True), ([plain], False)):
        (tmp_path / "shard").write_bytes(data := document_shards.to_parquet(documents))
        assert list(read_shard(f"{tmp_path}/shard")) == documents
        segment = pq.read_schema(io.BytesIO(data)).field("segments").type.value_type
        assert ("trained" in [field.name for field in segment]) is column


def test_a_file_that_holds_no_documents_is_named(tmp_path: Path) -> None:
    uri = str(tmp_path / "other.parquet")
    buffer = io.BytesIO()
    pq.write_table(pa.table({"number": [1, 2]}), buffer)
    storage.write_bytes(uri, buffer.getvalue())
    with pytest.raises(ShardError, match=rf"^{uri}: row group 0 cannot be read"):
        list(read_shard(uri))
    storage.write_bytes(uri, b"no Parquet at all")
    with pytest.raises(ShardError, match=rf"^{uri}: its footer cannot be read"):
        list(read_shard(uri))


def test_storage_that_fails_is_no_damage(directory: str) -> None:
    uri, sha256 = document_shards.shards(directory)[0]
    assert hashlib.sha256(Path(uri).read_bytes()).hexdigest() == sha256
    Path(uri).unlink()
    with pytest.raises(storage.NotFound, match=uri):
        list(read_shard(uri, sha256))
