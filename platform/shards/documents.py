"""Curated documents in Parquet: one document a row, in shards that a manifest publishes.

Reading needs no cluster: training jobs and the evaluation iterate `read_documents`.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, cast

from calumma.model.document import Document, Text
from calumma.platform import storage
from calumma.platform.shards.partial import PartialFile, extent
from calumma.platform.shards.row_groups import ShardError
from calumma.platform.specification import SpecificationError
from calumma.platform.storage.manifest import Manifest

if TYPE_CHECKING:
    from pyarrow import RecordBatch
    from pyarrow.parquet import FileMetaData, ParquetFile

CURATED = "curated"  # Manifest.kind
IMAGE_DOCUMENTS_A_ROW_GROUP = 64
ROW_GROUP_CHARACTERS, ROW_GROUP_DOCUMENTS = 1 << 20, 4096  # characters and documents of a row group of texts, about
_ADVICE = "if that is no passing failure, curate its documents again"
READ_BATCH = 256  # documents read at once: what is read stays in the processor's cache until it is used


def schema(trained: bool = True) -> Any:
    """The Arrow schema of `Document.to_row`; without `trained`, of documents in which every segment is."""
    import pyarrow as pa

    text = pa.string()
    segment = [("kind", text), ("text", text), ("image", pa.binary()), ("caption", text), ("role", text)]
    if trained:
        segment.append(("trained", pa.bool_()))  # null where it is
    return pa.schema([("segments", pa.list_(pa.struct(segment))), *((n, text) for n in ("source", "license", "url"))])


def to_parquet(documents: Sequence[Document]) -> bytes:
    """A shard's bytes (zstd); equal documents give equal bytes."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    buffer = io.BytesIO()
    # Hardly any data needs the column, and reading it takes time.
    columns = schema(trained=any(not segment.trained for document in documents for segment in document.segments))
    with pq.ParquetWriter(buffer, columns, compression="zstd", use_dictionary=["source", "license", "url"]) as writer:
        for group in _row_groups(documents):
            writer.write_table(pa.Table.from_pylist([document.to_row() for document in group], columns))
    return buffer.getvalue()


def from_parquet(data: bytes, name: str) -> list[Document]:
    """The inverse of `to_parquet`, for shards that are small. `name`: of the file, in messages. Raises ShardError.

    Arrow reads memory of its own here. Of a Python file it keeps threads reading, and one that still lets go of it
    while the interpreter ends takes the process with it ("terminate called without an active exception")."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.ParquetFile(pa.BufferReader(data), pre_buffer=False).read(use_threads=False)
        return [Document.from_row(row) for row in table.to_pylist()]
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError) as error:
        raise _unreadable(name, error) from error


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


def read_shard(uri: str, sha256: str | None = None) -> Iterator[Document]:
    """Documents of one shard, in order.

    Raises StorageError, ShardError where a row group cannot be read, and ShardError at the end where the whole file is
    not that of this checksum: damage that can still be read as documents is told to whoever takes all of them.
    """
    import pyarrow.parquet as pq

    with storage.open_read(uri) as raw:
        metadata, extents = _footer(uri, raw)
        file, part = _Sequential(raw), PartialFile(raw.seek(0, io.SEEK_END))
        raw.seek(0)
        table = pq.ParquetFile(part, metadata=metadata)
        for number, (begin, end) in enumerate(extents):
            file.read(begin)
            part.set_bytes(file.read(end), begin)
            yield from _documents(table, number, f"{uri}: row group {number}")
        file.read(None)
    found = file.checksum.hexdigest()
    if sha256 is not None and found != sha256:
        said = f"has checksum {found[:16]}…, where its manifest says {sha256[:16]}…"
        raise ShardError(f"{uri} {said}; {_ADVICE}")


def _footer(uri: str, file: io.BufferedIOBase) -> tuple[FileMetaData, list[tuple[int, int]]]:
    """The metadata of a shard, and where its row groups begin and end."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        metadata = pq.ParquetFile(cast(Any, file)).metadata
        extents = [extent(metadata, number) for number in range(metadata.num_row_groups)]
        places = [place for begin_end in extents for place in begin_end]
        if places != sorted(places) or (places and places[0] < 0):
            raise ValueError("its row groups overlap")
    except storage.StorageError:
        raise
    except (pa.ArrowException, OSError, ValueError) as error:
        raise _unreadable(f"{uri}: its footer", error) from error
    return metadata, extents


def _documents(table: ParquetFile, row_group: int, where: str) -> Iterator[Document]:
    import pyarrow as pa

    try:
        for batch in table.iter_batches(READ_BATCH, [row_group], use_threads=False):
            yield from _batch_documents(batch)
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError) as error:
        raise _unreadable(where, error) from error


def _batch_documents(batch: RecordBatch) -> Iterator[Document]:
    """The documents of a batch of rows. Plain texts come column by column: a dictionary for each row and each segment
    takes twice as long, as much as a tenth of tokenizing a short one."""
    segments = batch.column("segments")
    values = segments.flatten()
    names = {field.name for field in values.type}
    others = [values.field(name) for name in ("image", "caption", "role", "trained") if name in names]
    plain = not segments.null_count and not values.null_count and all(o.null_count == len(o) for o in others)
    if not plain or set(values.field("kind").to_pylist()) - {"text"}:
        yield from map(Document.from_row, batch.to_pylist())
        return
    texts = [Text(text) for text in values.field("text").to_pylist()]
    first = segments.offsets[0].as_py()  # of a slice, whose flattened values begin there
    ends = [end - first for end in segments.offsets.to_pylist()]
    about = (batch.column(name).to_pylist() for name in ("source", "license", "url"))
    for begin, end, source, license, url in zip(ends, ends[1:], *about, strict=False):
        yield Document(tuple(texts[begin:end]), source or "", license or "", url or "")


def _unreadable(what: str, error: Exception) -> ShardError:
    told = " ".join(f"{error}".split())  # pyarrow's have several lines
    return ShardError(f"{what} cannot be read ({told}); {_ADVICE}")


class _Sequential:
    """A file that is read from its begin to its end, with the checksum of what was read."""

    def __init__(self, file: io.BufferedIOBase) -> None:
        self._file, self._place = file, 0
        self.checksum = hashlib.sha256()

    def read(self, end: int | None) -> bytes:
        """From where the last reading ended up to this byte, or to the last of all."""
        data = self._file.read(-1 if end is None else end - self._place)
        self.checksum.update(data)
        self._place += len(data)
        return data


def read_documents(uri_dir: str) -> Iterator[Document]:
    """All documents of a published directory, in the order of its manifest.

    Raises StorageError (NotFound when nothing is published there), SpecificationError when it holds no documents, and
    ShardError for a shard that is damaged.
    """
    for shard in shards(uri_dir):
        yield from read_shard(*shard)


def shards(uri_dir: str, manifest: Manifest | None = None) -> list[tuple[str, str]]:
    """(URI, sha256) of a curated directory's shards, in order: what `read_shard` takes. Raises as `curated`."""
    manifest = manifest or curated_manifest(uri_dir)
    return [(storage.join(uri_dir, entry.path), entry.sha256) for entry in manifest.files]


def curated_manifest(uri_dir: str) -> Manifest:
    """The manifest of a directory of curated documents.

    Raises StorageError (NotFound when nothing is published there) and SpecificationError when it holds no documents.
    """
    manifest = Manifest.find(uri_dir)
    if manifest is None:
        raise SpecificationError(f"{uri_dir}: no documents are published there; run the job curate for them first")
    if manifest.kind != CURATED:
        raise SpecificationError(f"{uri_dir} holds {manifest.kind!r}, not curated documents")
    return manifest
