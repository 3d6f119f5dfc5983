"""Records of JSON, one a line or in one large array, read a little at a time; and documents of any records.

`json_rows` and `json_lines` yield (name of the place, record) pairs, and a `BadInput` for what is damaged; `drafts`
makes documents of such pairs, whatever they were read from.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

from calumma.platform.sources.files import BadInput, Draft, DraftSegment, File, Malformed, json_type
from calumma.platform.sources.formats.records.json_array import (
    BYTE_ORDER_MARK,
    CHUNK_BYTES,
    FIRST_KEY,
    LONGEST_LINE,
    Row,
    json_array,
)
from calumma.platform.sources.formats.records.json_values import KeyTwice, parse
from calumma.platform.sources.registry import ReaderItem
from calumma.platform.storage import StorageError

TRIES = 20  # objects in a damaged line that are looked at
ARRAY = re.compile(rb"(?:\xef\xbb\xbf)?\s*\[\s*(?:\{|$)")  # how a file begins that is an array, whatever its name
WIDE = (b"\xff\xfe", b"\xfe\xff")  # byte order marks of UTF-16 and UTF-32


def drafts(
    rows: Iterable[Row | BadInput],
    segments: Callable[[dict[str, Any]], Sequence[DraftSegment]],
    file: File | None = None,
    known: frozenset[str] = frozenset(),
) -> Iterator[ReaderItem]:
    """A draft for each record by its segments; one that `segments` finds Malformed is a bad input. Fields that are not
    `known` are counted in the notes of `file`."""
    for row in rows:
        if isinstance(row, BadInput):
            yield row
            continue
        name, record = row
        if file is not None and not known.issuperset(record):
            for field, value in record.items():
                if field not in known and value is not None:
                    file.notes.skip("fields", field)
        try:
            yield Draft.from_record(segments(record), name, record)
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
    place = file.at("line ")
    keys: dict[bytes, frozenset[str]] = {}  # of the first record: its first key as written, and all
    while True:
        number += 1
        name = f"{place}{number}"
        try:
            line = file.content.readline(LONGEST_LINE + 1)
            if too_long := len(line) > LONGEST_LINE:
                skip_line(file)
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
        if number == 1 and line.startswith(WIDE):
            yield BadInput(file.name, "is UTF-16 or UTF-32; convert it: iconv -f UTF-16 -t UTF-8", file.size)
            return
        first, behind_damage = behind_damage, False
        try:
            row = parse(line)
        except KeyTwice as error:
            yield BadInput(name, str(error))
            continue
        except (ValueError, RecursionError) as error:  # no UTF-8, no JSON, an endless number, endless brackets
            if first:
                continue  # the rest of the line that the damage cut
            if number == 1 and ARRAY.match(line):
                yield from json_array(file, line)
                return
            if number == 1 and file.plain_name.endswith(".json"):  # as a rule one object over many lines
                yield BadInput(file.name, f"neither an array of records nor one record a line: {error}", file.size)
                return
            if (cut := cut_line(file, name, line)) is not None:
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
        if isinstance(row, list) and number == 1 and ARRAY.match(line) and not line.endswith(b"\n"):
            yield from json_array(file, line)  # all of the file
            return
        yield (name, row) if isinstance(row, dict) else BadInput(name, f"holds {json_type(row)}, not an object")


def _last_record(line: bytes, keys: dict[bytes, frozenset[str]]) -> tuple[int, dict[str, Any] | None]:
    """The record at the end of a line whose beginning is damaged: the end of the line before it may be lost."""
    for key, all_keys in keys.items():
        for match in islice(re.compile(rb"\{\s*" + re.escape(key) + rb"\s*:").finditer(line, 1), TRIES):
            try:
                row = parse(line[match.start() :])
            except (ValueError, RecursionError):
                continue
            if 2 * len(all_keys & row.keys()) >= len(all_keys):
                return match.start(), row
    return 0, None


def cut_line(file: File, name: str, line: bytes) -> BadInput | None:
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


def skip_line(file: File) -> None:
    while (more := file.content.readline(CHUNK_BYTES)) and not more.endswith(b"\n"):
        pass
