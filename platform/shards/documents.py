"""Curated documents in Parquet: one document a row, in shards that a manifest publishes.

Reading needs no cluster: training jobs and the evaluation iterate `read_documents`.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from typing import Any, cast

from calumma.model.document import Document
from calumma.platform import storage
from calumma.platform.specification import SpecificationError
from calumma.platform.storage.manifest import Manifest

CURATED = "curated"  # Manifest.kind
IMAGE_DOCUMENTS_A_ROW_GROUP = 64
ROW_GROUP_CHARACTERS, ROW_GROUP_DOCUMENTS = 1 << 20, 4096  # characters and documents of a row group of texts, about
READ_BATCH = 256  # documents read at once: what is read stays in the processor's cache until it is used


def schema() -> Any:
    """The Arrow schema of `Document.to_row`."""
    import pyarrow as pa

    text = pa.string()
    segment = [("kind", text), ("text", text), ("image", pa.binary()), ("caption", text), ("role", text)]
    return pa.schema([("segments", pa.list_(pa.struct(segment))), *((n, text) for n in ("source", "license", "url"))])


def to_parquet(documents: Sequence[Document]) -> bytes:
    """A shard's bytes (zstd); equal documents give equal bytes."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    buffer = io.BytesIO()
    with pq.ParquetWriter(buffer, schema(), compression="zstd", use_dictionary=["source", "license", "url"]) as writer:
        for group in _row_groups(documents):
            writer.write_table(pa.Table.from_pylist([document.to_row() for document in group], schema()))
    return buffer.getvalue()


def _row_groups(documents: Sequence[Document]) -> Iterator[list[Document]]:
    """Runs of documents. A few where there are images, which are held that many at a time both here and where the
    shard is read; more of texts, of which small row groups would take longer to read than to tokenize."""
    group: list[Document] = []
    size = 0
    for document in documents:
        if len(group) >= IMAGE_DOCUMENTS_A_ROW_GROUP and (
            size >= ROW_GROUP_CHARACTERS or len(group) >= ROW_GROUP_DOCUMENTS
        ):
            yield group
            group, size = [], 0
        group.append(document)
        size += ROW_GROUP_CHARACTERS if document.images else len(document.text)
    if group:
        yield group


def read_shard(uri: str) -> Iterator[Document]:
    """Documents of one shard, in order. Raises StorageError."""
    import pyarrow.parquet as pq

    with storage.open_read(uri) as file:
        table = pq.ParquetFile(cast(Any, file))
        for group in range(table.num_row_groups):
            for batch in table.iter_batches(READ_BATCH, [group], use_threads=False):
                for row in batch.to_pylist():
                    yield Document.from_row(row)


def read_documents(uri_dir: str) -> Iterator[Document]:
    """All documents of a published directory, in the order of its manifest.

    Raises StorageError (NotFound when nothing is published there) and SpecificationError when it holds no documents.
    """
    for uri in shard_uris(uri_dir):
        yield from read_shard(uri)


def shard_uris(uri_dir: str, manifest: Manifest | None = None) -> list[str]:
    """URIs of a curated directory's shards, in order. Raises as `read_documents`."""
    manifest = manifest or curated_manifest(uri_dir)
    return [storage.join(uri_dir, entry.path) for entry in manifest.files]


def curated_manifest(uri_dir: str) -> Manifest:
    """The manifest of a directory of curated documents. Raises as `read_documents`."""
    manifest = Manifest.find(uri_dir)
    if manifest is None:
        raise SpecificationError(f"{uri_dir}: no documents are published there; run the job curate for them first")
    if manifest.kind != CURATED:
        raise SpecificationError(f"{uri_dir} holds {manifest.kind!r}, not curated documents")
    return manifest
