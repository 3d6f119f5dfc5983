"""Records of tables: lines of JSON, one large JSON array, and Parquet, each read a little at a time.

Every function yields (name of the place, record) pairs, and a `BadInput` for what is damaged. `drafts` makes them
documents.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, cast

from calumma.platform.sources.files import BadInput, Draft, DraftSegment, File, Malformed, json_type
from calumma.platform.sources.registry import ReaderItem
from calumma.platform.storage import StorageError

LONGEST_LINE = 256 << 20  # bytes; a conversation with its images as data URLs is one line
CHUNK_BYTES = 16 << 10  # of a JSON array: how exactly the loss behind a damage is known
DEEPEST_NESTING = 200  # brackets in brackets of one record
BATCH_BYTES = 16 << 20  # bytes of a Parquet file that are rows at once
BATCH_ROWS = 1024
COLUMN_BUFFER = 1 << 20  # bytes of a column that are read at once; without it Arrow reads all of a row group's

Row = tuple[str, dict[str, Any]]


def drafts(
    rows: Iterable[Row | BadInput], parse: Callable[[dict[str, Any]], Sequence[DraftSegment]]
) -> Iterator[ReaderItem]:
    """A draft for each record by its segments; one that `parse` finds Malformed is a bad input."""
    for row in rows:
        if isinstance(row, BadInput):
            yield row
            continue
        name, record = row
        try:
            yield Draft.from_record(parse(record), name, record)
        except Malformed as error:
            yield BadInput(name, str(error))


def json_rows(file: File) -> Iterator[Row | BadInput]:
    """The records of a JSON file: one array of them, or one a line, whatever its name promises."""
    if file.plain_name.endswith(".json"):
        try:
            start = file.content.peek(CHUNK_BYTES).removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
        except StorageError:
            raise
        except OSError:
            start = b""  # damage that json_lines names
        if start == b"[":
            return json_array(file)
    return json_lines(file)


def json_lines(file: File) -> Iterator[Row | BadInput]:
    """One record a line."""
    number = 0
    while True:
        number += 1
        name = file.at(f"line {number}")
        try:
            line = file.content.readline(LONGEST_LINE + 1)
            if too_long := len(line) > LONGEST_LINE:
                _skip_line(file)
        except StorageError:
            raise
        except OSError as error:
            yield BadInput(name, f"the file is damaged from here on: {error}", file.bytes_left)
            return
        if not line:
            return
        if too_long:
            yield BadInput(name, f"longer than {LONGEST_LINE:,} bytes")
            continue
        if line.isspace():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:  # no UTF-8, no JSON, an endless number, endless brackets
            if number == 1 and file.plain_name.endswith(".json"):  # as a rule one object over many lines
                yield BadInput(file.uri, f"neither an array of records nor one record a line: {error}", file.size)
                return
            yield BadInput(name, f"not a line of JSON: {error}")
            continue
        yield (name, row) if isinstance(row, dict) else BadInput(name, f"holds {json_type(row)}, not an object")


def _skip_line(file: File) -> None:
    while (more := file.content.readline(CHUNK_BYTES)) and not more.endswith(b"\n"):
        pass


def json_array(file: File) -> Iterator[Row | BadInput]:
    """The elements of one array, which may be far larger than memory. What follows the first damage is lost."""
    import ijson
    from ijson.common import ObjectBuilder

    content = file.content
    if content.peek(3).startswith(b"\xef\xbb\xbf"):
        content.read(3)
    number, depth = 0, 0
    chunks = _ChunkReader(file)
    builder = ObjectBuilder()
    try:
        # ijson.items would do, but it keeps a path for every open bracket: a file of brackets fills the memory.
        for event, value in ijson.basic_parse(chunks, use_float=True, buf_size=CHUNK_BYTES):
            closes = event in ("end_map", "end_array")
            depth -= closes
            if depth:
                builder.event(event, value)
            depth += event in ("start_map", "start_array")
            if depth > DEEPEST_NESTING:
                raise Malformed(f"more than {DEEPEST_NESTING} brackets in each other")
            if depth == 1 and (closes or event not in ("start_map", "start_array")):
                name, row = file.at(f"item {number}"), builder.value
                yield (name, row) if isinstance(row, dict) else BadInput(name, f"holds {json_type(row)}, not an object")
                number, builder = number + 1, ObjectBuilder()
    except StorageError:
        raise
    except (ijson.JSONError, OSError, Malformed, ValueError) as error:
        reason = " ".join(str(error).splitlines()[:1])
        yield BadInput(file.at(f"item {number}"), f"the array is damaged from here on: {reason}", chunks.bytes_left)


class _ChunkReader:
    """A file's content for ijson. `bytes_left`: of the newest chunk and all behind it."""

    def __init__(self, file: File) -> None:
        self._file = file
        self.bytes_left = file.size

    def read(self, size: int) -> bytes:
        self.bytes_left = self._file.bytes_left
        return self._file.content.read(size)


def parquet_rows(file: File, columns: Callable[[list[str]], Sequence[str]]) -> Iterator[Row | BadInput]:
    """Rows of a Parquet file with the columns that `columns` chooses of those there are (it may raise Malformed).

    A row group that cannot be read is one bad input; the others are kept.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    unreadable = (pa.ArrowException, OSError, UnicodeDecodeError)
    try:
        table = pq.ParquetFile(cast(Any, file.raw), buffer_size=COLUMN_BUFFER, pre_buffer=False)
        chosen = columns(table.schema_arrow.names)
    except StorageError:
        raise
    except unreadable as error:
        raise Malformed(f"not a readable Parquet file: {error}") from error
    total = max(1, table.metadata.num_rows)
    for group in range(table.num_row_groups):
        number = 0
        group_metadata = table.metadata.row_group(group)
        size = max(1, group_metadata.total_byte_size // max(1, group_metadata.num_rows))
        at_once = max(1, min(BATCH_ROWS, BATCH_BYTES // size))
        try:
            for batch in table.iter_batches(at_once, row_groups=[group], columns=list(chosen), use_threads=False):
                for row in batch.to_pylist():
                    yield file.at(f"row group {group}, row {number}"), row
                    number += 1
        except StorageError:
            raise
        except unreadable as error:
            lost = group_metadata.num_rows - number
            reason = f"{lost:,} rows cannot be read: {error}"
            yield BadInput(file.at(f"row group {group}"), reason, round(lost / total * file.size))
