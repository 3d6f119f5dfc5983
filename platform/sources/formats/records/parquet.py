"""Records of Parquet, a little at a time. A bad value costs its row, a damaged page its rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

from calumma.platform.sources.files import BadInput, File, Malformed
from calumma.platform.sources.formats.records.json_array import Row
from calumma.platform.sources.formats.records.parquet_repair import PatchedFile, patches
from calumma.platform.storage import StorageError

BATCH_BYTES = 16 << 20  # bytes of a Parquet file that are rows at once
BATCH_ROWS = 1024
COLUMN_BUFFER = 1 << 20  # bytes of a column that are read at once; without it Arrow reads all of a row group's


def parquet_rows(file: File, columns: Callable[[list[str]], Sequence[str]]) -> Iterator[Row | BadInput]:
    """Rows of a Parquet file with the columns that `columns` chooses of those there are (it may raise Malformed).

    Rows that cannot be read are bad inputs: each alone where its value is bad, together where they share a damaged page
    or, of lists, the rest of a row group.
    """
    unreadable = _unreadable()
    try:
        table = _opened(file.raw)
        chosen = columns(table.schema_arrow.names)
    except StorageError:
        raise
    except unreadable as error:
        raise Malformed(f"not a readable Parquet file: {error}") from error
    metadata = table.metadata
    if metadata.num_rows != sum(metadata.row_group(n).num_rows for n in range(table.num_row_groups)):
        yield BadInput(file.uri, "its footer is damaged: it counts other rows than its row groups have", 1)
    for group in range(table.num_row_groups):
        yield from _RowGroup(file, table, group, list(chosen)).rows()


def _unreadable() -> tuple[type[Exception], ...]:
    import pyarrow as pa

    return (pa.ArrowException, OSError, UnicodeDecodeError)


def _opened(raw: Any) -> Any:
    import pyarrow.parquet as pq

    return pq.ParquetFile(raw, buffer_size=COLUMN_BUFFER, pre_buffer=False, page_checksum_verification=True)


class _RowGroup:
    def __init__(self, file: File, table: Any, group: int, columns: list[str]) -> None:
        self._file, self._table, self._group, self._columns = file, table, group, columns
        self._count = table.metadata.row_group(group).num_rows
        self._number = 0  # rows that are read
        self._problem = "they are missing"
        self._hidden: set[int] = set()  # rows of damaged pages
        self._place = file.at(f"row group {group}, row ")

    def rows(self) -> Iterator[Row | BadInput]:
        size = max(1, self._table.metadata.row_group(self._group).total_byte_size // max(1, self._count))
        at_once = max(1, min(BATCH_ROWS, BATCH_BYTES // size))
        yield from self._read(self._table, at_once)
        while self._number < self._count and at_once > 1:
            at_once = max(1, at_once // 32)  # what stands before the damage is kept
            yield from self._read(self._table, at_once)
        if self._number < self._count and (found := patches(self._file.raw, self._table, self._group, self._columns)):
            self._hidden = {row for patch in found for row in range(patch.first, patch.last)}
            yield from self._read(_opened(cast(Any, PatchedFile(self._file.raw, found))), BATCH_ROWS)
        if self._number < self._count:
            yield self._lost(self._number, self._count)

    def _lost(self, first: int, last: int) -> BadInput:
        share = (last - first) / max(1, self._table.metadata.num_rows)
        reason = f"{last - first:,} rows cannot be read, from row {first} on: {self._problem}"
        name = self._file.at(f"row group {self._group}")
        return BadInput(name, reason, max(1, round(share * self._file.size)))

    def _read(self, table: Any, at_once: int) -> Iterator[Row | BadInput]:
        """The rows from the first on that was not read, up to one that cannot be."""
        done = 0
        try:
            batches = table.iter_batches(at_once, row_groups=[self._group], columns=self._columns, use_threads=False)
            for batch in batches:
                if done + batch.num_rows > self._number:
                    yield from self._batch(batch.slice(max(0, self._number - done)))
                done += batch.num_rows
        except StorageError:
            raise
        except _unreadable() as error:
            self._problem = str(error)

    def _batch(self, batch: Any) -> Iterator[Row | BadInput]:
        lost = 0
        for row in batch_rows(batch):
            if self._number in self._hidden:
                lost += 1
                if self._number + 1 not in self._hidden:
                    yield self._lost(self._number + 1 - lost, self._number + 1)
                    lost = 0
            else:
                name = f"{self._place}{self._number}"
                yield BadInput(name, row) if isinstance(row, str) else (name, row)
            self._number += 1
        if lost:
            yield self._lost(self._number - lost, self._number)


def batch_rows(batch: Any) -> list[dict[str, Any] | str]:
    """The rows of an Arrow batch; of each that has a value which Python cannot have (a text that is no UTF-8, a date
    behind the year 9999), what is wrong."""
    bad_value: tuple[type[Exception], ...] = (*_unreadable(), ValueError, OverflowError)
    try:
        rows: list[dict[str, Any] | str] = batch.to_pylist()
    except bad_value as error:
        if batch.num_rows == 1:
            return [f"cannot be read: {error}"]
        rows = [row for index in range(batch.num_rows) for row in batch_rows(batch.slice(index, 1))]
    return rows
