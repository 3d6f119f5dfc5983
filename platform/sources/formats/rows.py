"""Records of tables: lines of JSON, one large JSON array, and Parquet, each read a little at a time.

Every function yields (name of the place, record) pairs, and a `BadInput` for what is damaged. `drafts` makes them
documents.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, cast

from calumma.platform.sources.files import BadInput, Draft, DraftSegment, File, Malformed, json_type
from calumma.platform.sources.formats.json_array import (
    BYTE_ORDER_MARK,
    CHUNK_BYTES,
    FIRST_KEY,
    LONGEST_LINE,
    Row,
    json_array,
)
from calumma.platform.sources.registry import ReaderItem
from calumma.platform.storage import StorageError

BATCH_BYTES = 16 << 20  # bytes of a Parquet file that are rows at once
BATCH_ROWS = 1024
TRIES = 20  # objects in a damaged line that are looked at
COLUMN_BUFFER = 1 << 20  # bytes of a column that are read at once; without it Arrow reads all of a row group's


def drafts(
    rows: Iterable[Row | BadInput],
    parse: Callable[[dict[str, Any]], Sequence[DraftSegment]],
    file: File | None = None,
    known: Container[str] = (),
) -> Iterator[ReaderItem]:
    """A draft for each record by its segments; one that `parse` finds Malformed is a bad input. Fields that are not
    `known` are counted in the notes of `file`."""
    for row in rows:
        if isinstance(row, BadInput):
            yield row
            continue
        name, record = row
        if file is not None:
            for field, value in record.items():
                if field not in known and value is not None:
                    file.notes.skip("fields", field)
        try:
            yield Draft.from_record(parse(record), name, record)
        except Malformed as error:
            yield BadInput(name, str(error))


def json_rows(file: File) -> Iterator[Row | BadInput]:
    """The records of a JSON file: one array of them, or one a line, whatever its name promises."""
    start = b""
    if file.plain_name.endswith(".json"):
        try:
            start = file.content.peek(CHUNK_BYTES).removeprefix(BYTE_ORDER_MARK).lstrip()[:1]
        except StorageError:
            raise
        except OSError as error:
            damage, ends = file.damage(file.name, error)
            yield damage
            if ends:
                return
    yield from json_array(file) if start == b"[" else json_lines(file)


def json_lines(file: File) -> Iterator[Row | BadInput]:
    """One record a line."""
    number, behind_damage = 0, False
    keys: dict[bytes, frozenset[str]] = {}  # of the first record: its first key as written, and all
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
            damage, ends = file.damage(name, error)
            yield damage
            if ends:
                return
            behind_damage = True
            continue
        if not line:
            return
        if too_long:
            yield BadInput(name, f"longer than {LONGEST_LINE:,} bytes")
            continue
        if line.isspace():
            continue
        first, behind_damage = behind_damage, False
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:  # no UTF-8, no JSON, an endless number, endless brackets
            if first:
                continue  # the rest of the line that the damage cut
            if number == 1 and file.plain_name.endswith(".json"):  # as a rule one object over many lines
                yield BadInput(file.name, f"neither an array of records nor one record a line: {error}", file.size)
                return
            if (cut := _cut_line(file, name, line)) is not None:
                yield cut
                behind_damage = True
                continue
            begin, row = _last_record(line, keys)
            yield BadInput(name, f"not a line of JSON: {error}", begin)
            if row is not None:
                yield name, row
            continue
        if not keys and isinstance(row, dict) and (match := FIRST_KEY.match(line)):
            keys = {match[1]: frozenset(row)}
        yield (name, row) if isinstance(row, dict) else BadInput(name, f"holds {json_type(row)}, not an object")


def _last_record(line: bytes, keys: dict[bytes, frozenset[str]]) -> tuple[int, dict[str, Any] | None]:
    """The record at the end of a line whose beginning is damaged: the end of the line before it may be lost."""
    for key, all_keys in keys.items():
        for match in islice(re.compile(rb"\{\s*" + re.escape(key) + rb"\s*:").finditer(line, 1), TRIES):
            try:
                row = json.loads(line[match.start() :])
            except (ValueError, RecursionError):
                continue
            if 2 * len(all_keys & row.keys()) >= len(all_keys):
                return match.start(), row
    return 0, None


def _cut_line(file: File, name: str, line: bytes) -> BadInput | None:
    """The damage that cut this line, if one did."""
    if line.endswith(b"\n"):
        return None
    try:
        file.content.peek(1)
    except StorageError:
        raise
    except OSError as error:
        return file.damage(name, error)[0]
    return None


def _skip_line(file: File) -> None:
    while (more := file.content.readline(CHUNK_BYTES)) and not more.endswith(b"\n"):
        pass


def parquet_rows(file: File, columns: Callable[[list[str]], Sequence[str]]) -> Iterator[Row | BadInput]:
    """Rows of a Parquet file with the columns that `columns` chooses of those there are (it may raise Malformed).

    A row group that cannot be read is one bad input; the others are kept.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    unreadable = (pa.ArrowException, OSError, UnicodeDecodeError)
    try:
        table = pq.ParquetFile(
            cast(Any, file.raw), buffer_size=COLUMN_BUFFER, pre_buffer=False, page_checksum_verification=True
        )
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
