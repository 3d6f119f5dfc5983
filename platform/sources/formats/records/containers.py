"""Records out of any container: JSON lines and arrays, CSV and TSV, Parquet, and the Arrow files of Hugging Face's
`datasets` (`save_to_disk`, its cache). The same record gives the same document, whatever carries it."""

from __future__ import annotations

import csv
import io
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any, Literal, cast

from calumma.platform.sources import compression
from calumma.platform.sources.files import BadInput, File, Malformed
from calumma.platform.sources.formats.records.json_array import Row
from calumma.platform.sources.formats.records.parquet import batch_rows, parquet_rows
from calumma.platform.sources.formats.records.rows import WIDE, json_rows
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

    def chosen(present: list[str]) -> Sequence[str]:
        names = columns(present)
        _require_once(name for name in present if name in names)
        for name in present:
            if name not in names:
                file.notes.skip("columns", name)
        return names

    rows = arrow_rows(file, chosen) if name.endswith(".arrow") else parquet_rows(file, chosen)
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
    # newline="": a field in quotes may hold line breaks. What is no UTF-8 costs its row.
    text = io.TextIOWrapper(cast(Any, file.content), encoding="utf-8-sig", errors="surrogateescape", newline="")
    number = 0
    try:
        if file.content.peek(2)[:2] in WIDE:
            raise Malformed("is UTF-16; convert it: iconv -f UTF-16 -t UTF-8")
        header = text.readline()
        separator = "\t" if file.plain_name.endswith(".tsv") else max(",;\t|", key=header.count)
        names = [name.strip() for name in next(csv.reader([header], delimiter=separator), [])]
        _require_once(names)
        quoting: Literal[0, 3] = csv.QUOTE_NONE if separator == "|" else csv.QUOTE_MINIMAL
        for number, values in enumerate(_fields(text, delimiter=separator, strict=True, quoting=quoting), start=1):
            if not values:
                continue
            name = file.at(f"row {number}")
            if isinstance(values, str):
                yield BadInput(name, values)
                continue
            try:
                "".join(values).encode()
            except UnicodeEncodeError:
                yield BadInput(name, "is not UTF-8")
                continue
            if separator == "|":  # "a.jpg| 0| words", as Flickr30k's table has it
                values = [value.strip() for value in values]
            if len(values) != len(names):
                yield BadInput(name, f"has {len(values)} fields; the first line names {len(names)}")
                continue
            yield name, dict(zip(names, values, strict=True))
    except StorageError:
        raise
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        lost = max(file.bytes_left, min(error.size, file.size) if isinstance(error, _Endless) else 0)
        yield BadInput(file.at(f"row {number + 1}"), f"the table is damaged from here on: {error}", lost)
    finally:
        text.detach()


class _Endless(csv.Error):
    """A quotation mark has no other; `size`: the characters behind it."""

    def __init__(self, message: str, size: int) -> None:
        super().__init__(message)
        self.size = size


def _fields(lines: Iterator[str], **dialect: Any) -> Iterator[list[str] | str]:
    """The fields of every row of CSV, or what is wrong with one; reading goes on at the line behind it.

    Raises csv.Error, of which _Endless where quotation marks have no end."""
    taken = size = 0

    def counted() -> Iterator[str]:
        nonlocal taken, size
        for line in lines:
            taken, size = taken + 1, size + len(line)
            yield line

    rows = csv.reader(counted(), **dialect)
    while True:
        taken = size = 0
        try:
            yield next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            if "expected after" not in str(error):
                raise _Endless(f"{error} ({taken} lines)", size) from error
            yield f"not a row of the table: {error}" + (f" ({taken} lines)" if taken > 1 else "")
            rows = csv.reader(counted(), **dialect)


def _require_once(names: Iterable[str]) -> None:
    """Raises Malformed for a column that is there more than once."""
    if repeated := sorted(name for name, count in Counter(names).items() if count > 1):
        raise Malformed(f"has the column {', '.join(map(repr, repeated))} more than once")


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
            for row in batch_rows(batch.select(chosen)):
                name = file.at(f"row {number}")
                yield BadInput(name, row) if isinstance(row, str) else (name, row)
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
    """A list that a CSV field holds as JSON, or as Python writes one; else the value itself.

    Raises Malformed where texts of it have no comma between them, as NumPy writes them: Python would join them."""
    if not isinstance(value, str) or not re.match(r"\s*\[", value):
        return value
    import ast

    for parse in (json.loads, ast.literal_eval):
        try:
            found = parse(value)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        if isinstance(found, list):
            if parse is ast.literal_eval and _lacks_commas(value):
                raise Malformed("holds a list whose texts have no commas between them, as NumPy prints it")
            return found
    return value


def _lacks_commas(written: str) -> bool:
    """Whether two texts of a list that Python can read stand beside each other."""
    import tokenize

    tokens = tokenize.generate_tokens(io.StringIO(written.strip()).readline)
    kinds = [token.type for token in tokens if token.type not in (tokenize.NL, tokenize.COMMENT)]
    return any(one == other == tokenize.STRING for one, other in pairwise(kinds))
