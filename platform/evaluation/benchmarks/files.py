"""Reading benchmarks' files: JSON, JSON lines, CSV, Parquet, lists of labels; splits by the names of files."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Any

from calumma.platform import storage
from calumma.platform.evaluation.benchmarks.items import BenchmarkDataError

Row = dict[str, Any]
SPLITS = {
    "train": r"train(ing)?",
    "validation": r"validation|valid|val|dev",
    "test": r"test",
}
ROW_SUFFIXES = (".jsonl", ".json", ".parquet", ".csv")


def read_json(location: str) -> Any:
    """Raises BenchmarkDataError."""
    return parsed(read(location), location)


def read(location: str) -> bytes:
    try:
        return storage.read_bytes(location)
    except storage.NotFound as error:
        raise BenchmarkDataError(f"there is no {location}") from error


def parsed(data: bytes, location: str) -> Any:
    try:
        return json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise BenchmarkDataError(f"{location} is no whole JSON: {error}") from error


def files_below(location: str) -> list[str]:
    """Every file of a location, sorted. Raises BenchmarkDataError where there is none."""
    found = list(storage.list_inputs(location).sizes)
    if not found:
        raise BenchmarkDataError(f"there is nothing at {location}")
    return found


def named(location: str, pattern: str, what: str) -> list[str]:
    """The files below a location whose name, or path below it, matches. Raises BenchmarkDataError for none."""
    files = files_below(location)
    found = [uri for uri in files if re.search(pattern, uri[len(location.rstrip("/")) + 1 :])]
    if not found:
        names = ", ".join(PurePosixPath(uri).name for uri in files[:8])
        raise BenchmarkDataError(f"{location} has no {what}; it has {names}{' …' if len(files) > 8 else ''}")
    return found


def split_files(files: Sequence[str], split: str) -> list[str]:
    """Those whose name tells the split; or, of a folder named by it, all."""
    word = re.compile(rf"(?:^|[-_./])(?:{SPLITS[split]})(?=[-_./\d]|$)", re.IGNORECASE)
    own = [uri for uri in files if word.search(PurePosixPath(uri).name)]
    return own or [uri for uri in files if word.search("/".join(PurePosixPath(uri).parts[-3:-1]))]


def rows_of(uri: str) -> list[Row]:
    """The records of a file. Raises BenchmarkDataError that names the line."""
    data, suffix = read(uri), PurePosixPath(uri).suffix.lower()
    if suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            rows: list[Row] = pq.read_table(io.BytesIO(data)).to_pylist()
        except (pa.ArrowInvalid, OSError) as error:
            raise BenchmarkDataError(f"{uri} is no whole Parquet file: {error}") from error
        return rows
    if suffix == ".csv":
        return [
            {str(n): cell for n, cell in enumerate(row)} for row in csv.reader(io.StringIO(data.decode("utf-8-sig")))
        ]
    text = data.decode("utf-8-sig", "replace")
    if suffix == ".json" and text.lstrip().startswith("["):
        found = parsed(data, uri)
    elif suffix == ".json" and "\n{" not in text.strip():
        found = [parsed(data, uri)]
    else:
        found = [
            parsed(line.encode(), f"{uri}: line {number}")
            for number, line in enumerate(text.splitlines(), start=1)
            if line.strip()
        ]
    if not all(isinstance(row, dict) for row in found):
        raise BenchmarkDataError(f"{uri} holds something else than objects")
    return found


def field(row: Row, names: Sequence[str], place: str) -> Any:
    """The first of these fields that a record has. Raises BenchmarkDataError."""
    for name in names:
        if row.get(name) is not None:
            return row[name]
    raise BenchmarkDataError(f"{place} has no `{names[0]}`; it has {', '.join(row)}")


def label_list(uri: str) -> list[str]:
    """A label a line, as PIQA's and Social IQA's publishers keep them."""
    return [line.strip() for line in read(uri).decode().splitlines() if line.strip()]
