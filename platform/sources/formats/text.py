"""Plain text and code: a document a record of JSON lines or arrays, CSV, Parquet and Arrow, or a document a file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from calumma.model.document import Text
from calumma.platform.sources.encodings import Encoding, decode_text
from calumma.platform.sources.files import ABOUT_FIELDS, Draft, DraftSegment, File, Malformed, field_names, json_type
from calumma.platform.sources.formats.records.containers import PACKED, SUFFIXES, records
from calumma.platform.sources.formats.records.rows import drafts, json_lines
from calumma.platform.sources.registry import ReaderItem, reader

FIELDS = ("text", "content")
LARGEST = 256 << 20  # bytes of a file that is one document
KNOWN = frozenset(ABOUT_FIELDS)


@reader("text", SUFFIXES)
def text(file: File, *, field: str | None = None) -> Iterator[ReaderItem]:
    """{"text": …, "license": …, "url": …} a record; `field` names the text if it is neither `text` nor `content`."""
    fields = FIELDS if field is None else (field,)

    def columns(present: list[str]) -> Sequence[str]:
        _field(dict.fromkeys(present), fields)
        return [name for name in (*fields, *ABOUT_FIELDS) if name in present]

    yield from drafts(records(file, columns), lambda row: _text(row, fields), file, KNOWN | set(fields))


@reader("text_files", tuple(f"{form}{packed}" for form in (".txt", ".text", ".rst") for packed in PACKED))
def text_files(file: File, *, encoding: Encoding = "utf-8") -> Iterator[ReaderItem]:
    """A file a document, without the byte order mark that it may begin with."""
    yield Draft((Text(decode_text(file.read_all(LARGEST), default=encoding)),), file.uri)


@reader("jsonl", (".jsonl",))
def jsonl(file: File) -> Iterator[ReaderItem]:
    """{"text": …, "license": …, "url": …} a line."""
    yield from drafts(json_lines(file), lambda row: _text(row, FIELDS[:1]), file, KNOWN | {"text"})


def _field(row: Mapping[str, Any], fields: Sequence[str]) -> str:
    for field in fields:
        if row.get(field) is not None:
            return field
    if present := [field for field in fields if field in row]:
        return present[0]
    wanted = " or ".join(f"`{field}`" for field in fields)
    raise Malformed(
        f"has no {wanted}; it has {field_names(row)}; the source's options may name the field: {{field: NAME}}"
    )


def _text(row: Mapping[str, Any], fields: Sequence[str]) -> Sequence[DraftSegment]:
    field = _field(row, fields)
    words = row[field]
    if not isinstance(words, str):
        raise Malformed(f"`{field}` is {json_type(words)}, not a string")
    return (Text(words),)
