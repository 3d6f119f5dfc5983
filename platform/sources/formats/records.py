"""Records out of any container: JSON lines and arrays, CSV and TSV, Parquet, and the Arrow files of Hugging Face's
`datasets` (`save_to_disk`, its cache). The same record gives the same document, whatever carries it."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, cast

from calumma.platform.sources import compression
from calumma.platform.sources.files import BadInput, File, Malformed
from calumma.platform.sources.formats.json_array import Row
from calumma.platform.sources.formats.parquet import parquet_rows
from calumma.platform.sources.formats.rows import json_rows
from calumma.platform.storage import StorageError

PACKED = ("", *compression.SUFFIXES)
JSON = tuple(f"{form}{packed}" for form in (".jsonl", ".json", ".ndjson") for packed in PACKED)
CSV = tuple(f"{form}{packed}" for form in (".csv", ".tsv") for packed in PACKED)
COLUMNAR = (".parquet", ".arrow")
SUFFIXES = (*JSON, *CSV, *COLUMNAR)
# Of a save_to_disk folder and of a dataset's repository: about the data, not data.
ABOUT = frozenset({"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"})
LONGEST_FIELD = 64 << 20  # characters of a field of CSV
FEATHER = b"ARROW1"
PARQUET = b"PAR1"

Columns = Callable[[list[str]], Sequence[str]]


def records(file: File, columns: Columns = lambda present: present) -> Iterator[Row | BadInput]:
    """The records of a file, by what its name promises (of Parquet and Arrow, by what it begins with).

    Of columnar files only what `columns` chooses is read; it may raise Malformed. Integers that Hugging Face's features
    declare as class labels are their names."""
    name = file.plain_name
    if name.rpartition("/")[2] in ABOUT:
        return
    if not name.endswith(COLUMNAR):
        yield from csv_rows(file) if name.endswith((".csv", ".tsv")) else json_rows(file)
        return
    labels = _class_labels(file)
    rows = arrow_rows(file, columns) if name.endswith(".arrow") else parquet_rows(file, columns)
    for row in rows:
        if labels and not isinstance(row, BadInput):
            for field, names in labels.items():
                value = row[1].get(field)
                if isinstance(value, int):  # -1: not known, as of a test's rows
                    row[1][field] = names[value] if 0 <= value < len(names) else None
        yield row


def csv_rows(file: File) -> Iterator[Row | BadInput]:
    """The rows of a CSV file (its separator found in its first line) or TSV file, by the names in its first line."""
    csv.field_size_limit(LONGEST_FIELD)
    # newline="": a field in quotes may hold line breaks.
    text = io.TextIOWrapper(cast(Any, file.content), encoding="utf-8-sig", newline="")
    number = 0
    try:
        header = text.readline()
        separator = "\t" if file.plain_name.endswith(".tsv") else max(",;\t|", key=header.count)
        names = [name.strip() for name in next(csv.reader([header], delimiter=separator), [])]
        if repeated := sorted({name for name in names if names.count(name) > 1}):
            raise Malformed(f"its first line has the column {', '.join(repeated)} more than once")
        quoting: Literal[0, 3] = csv.QUOTE_NONE if separator == "|" else csv.QUOTE_MINIMAL
        for number, values in enumerate(csv.reader(text, delimiter=separator, strict=True, quoting=quoting), start=1):
            if not values:
                continue
            name = file.at(f"row {number}")
            if separator == "|":  # "a.jpg| 0| words", as Flickr30k's table has it
                values = [value.strip() for value in values]
            if len(values) != len(names):
                yield BadInput(name, f"has {len(values)} fields; the first line names {len(names)}")
                continue
            yield name, dict(zip(names, values, strict=True))
    except StorageError:
        raise
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        yield BadInput(file.at(f"row {number + 1}"), f"the table is damaged from here on: {error}", file.bytes_left)
    finally:
        text.detach()


def arrow_rows(file: File, columns: Columns) -> Iterator[Row | BadInput]:
    """The rows of an Arrow stream or file (Feather), a batch at a time. What follows the first damage is lost."""
    import pyarrow as pa

    unreadable = (pa.ArrowException, OSError, UnicodeDecodeError)
    number = 0
    try:
        file.raw.seek(0)
        head = file.raw.read(len(FEATHER))
        file.raw.seek(0)
        if head == FEATHER:
            whole = pa.ipc.open_file(pa.PythonFile(file.raw, "r"))
            schema, batches = whole.schema, (whole.get_batch(i) for i in range(whole.num_record_batches))
        else:
            stream = pa.ipc.open_stream(pa.PythonFile(file.raw, "r"))
            schema, batches = stream.schema, iter(stream)
        chosen = list(columns(schema.names))
    except StorageError:
        raise
    except unreadable as error:
        raise Malformed(f"not a readable Arrow file: {error}") from error
    try:
        for batch in batches:
            for row in batch.select(chosen).to_pylist():
                yield file.at(f"row {number}"), row
                number += 1
    except StorageError:
        raise
    except unreadable as error:
        lost = max(0, file.size - file.raw.tell())
        yield BadInput(file.at(f"row {number}"), f"the file is damaged from here on: {error}", lost)


def _class_labels(file: File) -> dict[str, list[str]]:
    """Column -> names of its classes, of the features that Hugging Face's `datasets` writes into the schema."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file.raw.seek(0)
        head = file.raw.read(len(FEATHER))
        file.raw.seek(0)
        if head.startswith(PARQUET):
            schema = pq.read_schema(cast(Any, file.raw))
        elif head == FEATHER:
            schema = pa.ipc.open_file(pa.PythonFile(file.raw, "r")).schema
        else:
            schema = pa.ipc.open_stream(pa.PythonFile(file.raw, "r")).schema
        features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
        return {
            column: feature["names"]
            for column, feature in features.items()
            if isinstance(feature, dict) and feature.get("_type") == "ClassLabel" and feature.get("names")
        }
    except StorageError:
        raise
    except (pa.ArrowException, OSError, ValueError, LookupError, TypeError, AttributeError):
        return {}  # reading the rows tells what is wrong
    finally:
        file.raw.seek(0)


def words_of(value: Any) -> str | None:
    """A text as records hold it, without white space around it; None for none."""
    if isinstance(value, bool) or value is None:
        return None
    if isinstance(value, int):  # a class
        return str(value)
    return value.strip() or None if isinstance(value, str) else None


def list_in(value: Any) -> Any:
    """A list that a CSV field holds as JSON, or as Python writes one; else the value itself."""
    if not isinstance(value, str) or not re.match(r"\s*\[", value):
        return value
    import ast

    for parse in (json.loads, ast.literal_eval):
        try:
            found = parse(value)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        if isinstance(found, list):
            return found
    return value
