"""What one phase of a curation leaves for the next: staged documents, and tables that are read by ranges of a column.

Everything is below one folder of the output, which is deleted at the end. Names depend on the work alone: a task that
runs again, on whatever machine, writes the same files.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any, cast

import numpy as np

from calumma.model.document import Document
from calumma.platform import storage

FOLDER = ".staged"
DOCUMENTS, SIGNATURES, DROPS, SCORES = "documents", "signatures", "drops", "scores"  # folders in it
DOCUMENTS_PER_BATCH = 64
_THREADS = 16  # tables read at a time: most of it is waiting for storage
ROWS_PER_GROUP = 4096  # of a table: what is read when a range touches it

# A document's id is its place in the order of the specification: of duplicates the lowest stays.
_TASK_BITS, _ROW_BITS = 20, 32


def document_id(source: int, task: int, row: int) -> int:
    """64 bits that order documents by source, task and place in the task."""
    return ((source << _TASK_BITS) | task) << _ROW_BITS | row


@contextmanager
def staging_folder(output: str, mark: str) -> Iterator[str]:
    """The URI of an empty folder, deleted at the end, as is what killed runs have left. Raises StorageError."""
    place = storage.join(output, FOLDER)
    storage.delete(place)
    try:
        yield storage.join(place, mark)
    except BaseException:
        with suppress(storage.StorageError):  # the first failure is the one to tell
            storage.delete(place)
        raise
    storage.delete(place)


# -- documents ---------------------------------------------------------------------------------------------------------


def write_documents(uri: str, documents: Sequence[tuple[int, Document]]) -> None:
    """(identity, document) in order, metadata included. Raises StorageError."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    buffer = io.BytesIO()
    schema = _schema()
    with pq.ParquetWriter(buffer, schema, compression="zstd") as writer:
        for begin in range(0, len(documents), DOCUMENTS_PER_BATCH):
            rows = [
                {"id": number, "metadata": json.dumps(document.metadata), **document.to_row()}
                for number, document in documents[begin : begin + DOCUMENTS_PER_BATCH]
            ]
            writer.write_table(pa.Table.from_pylist(rows, schema))
    storage.write_bytes(uri, buffer.getvalue())


def read_documents(uri: str, numbers: frozenset[int] | None = None) -> Iterator[tuple[int, Document]]:
    """(identity, document) in order: all, or those of these identities. Raises StorageError."""
    import pyarrow.parquet as pq

    with storage.open_read(uri) as raw:
        file = pq.ParquetFile(cast(Any, raw))
        groups = list(range(file.num_row_groups))
        if numbers is not None:
            wanted = np.array(sorted(numbers), np.uint64)
            groups = [group for group in groups if _holds(file.metadata.row_group(group), 0, wanted)]
        for batch in file.iter_batches(DOCUMENTS_PER_BATCH, row_groups=groups):
            for row in batch.to_pylist():
                if numbers is None or row["id"] in numbers:
                    yield row["id"], replace(Document.from_row(row), metadata=json.loads(row["metadata"]))


def _schema() -> Any:
    import pyarrow as pa

    from calumma.platform.shards import documents as document_shards

    return pa.schema([("id", pa.uint64()), ("metadata", pa.string()), *document_shards.schema()])


def _holds(group: Any, column: int, wanted: Any) -> bool:
    low, high = _bounds(group, column)
    return bool(np.searchsorted(wanted, np.uint64(low)) < np.searchsorted(wanted, np.uint64(high), side="right"))


# -- tables ------------------------------------------------------------------------------------------------------------


def write_table(uri: str, columns: Mapping[str, Any]) -> None:
    """A table in Parquet, sorted by its first column (64 bits, unsigned). Raises StorageError.

    Columns are lists or arrays of unsigned integers, floats, or bytes of one length.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    order = np.argsort(np.asarray(next(iter(columns.values())), np.uint64), kind="stable")
    arrays = {name: _column(values).take(pa.array(order)) for name, values in columns.items()}
    buffer = io.BytesIO()
    pq.write_table(pa.table(arrays), buffer, row_group_size=ROWS_PER_GROUP, compression="zstd", use_dictionary=False)
    storage.write_bytes(uri, buffer.getvalue())


def _column(values: Any) -> Any:
    import pyarrow as pa

    if isinstance(values, np.ndarray):
        return pa.array(values)
    if values and isinstance(values[0], bytes):
        return pa.array(values, pa.binary(len(values[0])))
    return pa.array(values, pa.float64() if values and isinstance(values[0], float) else pa.uint64())


def read_tables(uris: Iterable[str], low: int = 0, high: int = 1 << 64) -> dict[str, Any]:
    """Rows of tables whose first column is in [low, high), as arrays by column; {} when no table has one.

    Bytes become a matrix of uint8. Raises StorageError.
    """
    import pyarrow as pa

    with ThreadPoolExecutor(_THREADS) as pool:
        tables = [table for table in pool.map(lambda uri: _rows(uri, low, high), uris) if table is not None]
    if not tables:
        return {}
    whole = pa.concat_tables(tables).combine_chunks()
    return {name: _array(whole.column(name).chunk(0)) for name in whole.column_names}


def _rows(uri: str, low: int, high: int) -> Any:
    """The rows of one table in a range, or None."""
    import pyarrow.parquet as pq

    with storage.open_read(uri) as raw:
        file = pq.ParquetFile(cast(Any, raw))
        some = [group for group in range(file.num_row_groups) if file.metadata.row_group(group).num_rows]
        bounds = {group: _bounds(file.metadata.row_group(group), 0) for group in some}
        groups = [group for group, (first, last) in bounds.items() if first < high and last >= low]
        if not groups:
            return None
        table = file.read_row_groups(groups)
    keys = table.column(0).to_numpy()
    begin = int(np.searchsorted(keys, np.uint64(low)))
    end = len(keys) if high >= 1 << 64 else int(np.searchsorted(keys, np.uint64(high)))
    return table.slice(begin, end - begin) if begin < end else None


def _array(column: Any) -> Any:
    import pyarrow as pa

    if pa.types.is_fixed_size_binary(column.type):
        width = column.type.byte_width
        data = np.frombuffer(column.buffers()[1], np.uint8)
        return data[column.offset * width : (column.offset + len(column)) * width].reshape(len(column), width)
    return column.to_numpy()


def _bounds(group: Any, column: int) -> tuple[int, int]:
    statistics = group.column(column).statistics
    return int(statistics.min), int(statistics.max)
