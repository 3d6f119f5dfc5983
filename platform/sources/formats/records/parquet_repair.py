"""Parquet whose pages are damaged: which rows of a row group a damaged page holds, and the file as if they were null.

pyarrow reads a column's pages one after another, and cannot go past a damaged one. In the patched file such a page has
become one of nulls (of empty values, where none may be null), as long as the page was: a field of the header that
readers do not know fills the rest. Columns of lists are left as they are: how many rows a page of theirs had only the
page tells. https://parquet.apache.org/docs/file-format/data-pages/, https://github.com/apache/parquet-format (Thrift)
"""

from __future__ import annotations

import io
import zlib
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

from calumma.platform.storage import StorageError

DATA_PAGE, DATA_PAGE_V2 = 0, 3
BINARY, LIST, STRUCT = 8, 9, 12
UNCOMPRESSED = "uncompressed"
CODECS = {0: UNCOMPRESSED, 1: "snappy", 2: "gzip", 4: "brotli", 6: "zstd", 7: "lz4_raw"}
MOST_HEADER = 1 << 20  # bytes
LARGEST_COLUMN = 512 << 20  # bytes of a row group's column: it is held in memory
# What numbers that are anything may raise.
DAMAGED = (ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError, OSError)


class Patch(NamedTuple):
    """The bytes that stand in a file at a place instead, and the rows of the row group that they hide."""

    place: int
    data: bytes
    first: int
    last: int


class _Unreadable(ValueError):
    pass


class _Column(NamedTuple):
    """Where a row group's column stands in the file. compression: PyArrow's name of a codec."""

    path: str
    compression: str
    begin: int
    size: int


def patches(raw: Any, table: Any, group: int, columns: Collection[str]) -> list[Patch]:
    """For the damaged pages of a row group's flat columns; none for those that cannot be told apart."""
    found: list[Patch] = []
    try:
        chunks = _row_group(raw, group)
    except StorageError:
        raise
    except DAMAGED:
        return found
    for index, chunk in enumerate(chunks):
        try:
            column, kind = _column(chunk), table.schema.column(index)
            if column.path not in columns or kind.max_repetition_level or column.size > LARGEST_COLUMN:
                continue
            raw.seek(column.begin)
            found += _column_patches(raw.read(column.size), column, kind)
        except StorageError:
            raise
        except DAMAGED:
            continue
    return found


def _row_group(raw: Any, group: int) -> list[Any]:
    """Its columns as the file's end describes them. pyarrow's own description of a column ends the process where the
    column's statistics are damaged."""
    raw.seek(-8, io.SEEK_END)
    length = int.from_bytes(raw.read(4), "little")
    raw.seek(-8 - length, io.SEEK_END)
    columns: list[Any] = _struct(raw.read(length), 0)[0][4][group][1]
    return columns


def _column(chunk: dict[int, Any]) -> _Column:
    about = chunk[3]
    if about[4] not in CODECS:
        raise _Unreadable("its compression is not known")
    begin = min(about[9], about.get(11) or about[9])  # of its first page, and of its dictionary
    if begin < 0:
        raise _Unreadable("it begins before the file")
    return _Column(".".join(name.decode() for name in about[3]), CODECS[about[4]], begin, about[7])


def _column_patches(chunk: bytes, column: _Column, kind: Any) -> list[Patch]:
    found = []
    place = row = 0
    while place < len(chunk):
        header, content = _struct(chunk[place : place + MOST_HEADER], 0)
        start, stop = place + content, place + content + int(header.get(3, -1))
        values = header.get(5, header.get(8, {}))
        if not start <= stop <= len(chunk) or not isinstance(values, dict):
            raise _Unreadable("a page ends outside its column")
        if header.get(1) in (DATA_PAGE, DATA_PAGE_V2):
            count = int(values.get(1, 0))
            if _is_damaged(header, chunk[start:stop], column.compression):
                page = _null_page(count, stop - place, column, kind)
                found.append(Patch(column.begin + place, page, row, row + count))
            row += count
        place = stop
    return found


def _is_damaged(header: dict[int, Any], page: bytes, compression: str) -> bool:
    import pyarrow as pa

    if 4 in header and zlib.crc32(page) != int(header[4]) & 0xFFFFFFFF:
        return True
    if header[1] == DATA_PAGE_V2 or compression == UNCOMPRESSED:
        return False
    try:
        return len(pa.Codec(compression).decompress(page, int(header[2]))) != int(header[2])
    except (pa.ArrowException, OSError, ValueError):
        return True


def _null_page(count: int, size: int, column: _Column, kind: Any) -> bytes:
    """A page of `count` nulls, so many bytes long."""
    import pyarrow as pa

    if kind.max_definition_level:
        levels = _varint(count << 1) + b"\0"
        content = len(levels).to_bytes(4, "little") + levels
    elif kind.physical_type == "BYTE_ARRAY":
        content = bytes(4 * count)  # lengths
    else:
        raise _Unreadable("its values cannot be left out")
    plain = column.compression == UNCOMPRESSED
    packed = content if plain else pa.Codec(column.compression).compress(content, asbytes=True)
    head = b"\x15\x00\x15" + _varint(len(content) << 1) + b"\x15" + _varint(len(packed) << 1)
    head += b"\x2c\x15" + _varint(count << 1) + b"\x15\x00\x15\x06\x15\x06\x00"
    left = size - len(head) - len(packed) - 1
    for digits in range(1, 5):
        filler = left - 3 - digits  # a binary field of the id 100
        if filler >= 0 and len(_varint(filler)) == digits:
            return head + b"\x08" + _varint(200) + _varint(filler) + bytes(filler) + b"\0" + packed
    raise _Unreadable("the page is too short")


# -- Thrift's compact protocol -----------------------------------------------------------------------------------------


def _struct(data: bytes, place: int) -> tuple[dict[int, Any], int]:
    """The values of a struct by their ids, and where it ends."""
    fields: dict[int, Any] = {}
    number = 0
    while (byte := data[place]) != 0:
        place += 1
        if byte >> 4:
            number += byte >> 4
        else:
            zigzag, place = _read_varint(data, place)
            number = zigzag >> 1
        fields[number], place = _value(data, place, byte & 15)
    return fields, place + 1


def _value(data: bytes, place: int, kind: int) -> tuple[Any, int]:
    if kind in (1, 2):
        return kind == 1, place
    if kind == 3:
        return data[place], place + 1
    if kind in (4, 5, 6):
        value, place = _read_varint(data, place)
        return (value >> 1) ^ -(value & 1), place
    if kind == 7:
        return None, place + 8
    if kind == BINARY:
        length, place = _read_varint(data, place)
        return data[place : place + length], place + length
    if kind == LIST:
        count, kind = data[place] >> 4, data[place] & 15
        place += 1
        if count == 15:
            count, place = _read_varint(data, place)
        values = []
        for _ in range(min(count, len(data))):
            value, place = _value(data, place, kind) if kind > 2 else (data[place] == 1, place + 1)
            values.append(value)
        return values, place
    if kind == STRUCT:
        return _struct(data, place)
    raise _Unreadable(f"a header has a field of the type {kind}")


def _read_varint(data: bytes, place: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[place]
        place += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, place
        shift += 7
        if shift > 63:
            raise _Unreadable("a header has a number without end")


def _varint(value: int) -> bytes:
    digits = bytearray()
    while value > 0x7F:
        digits.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*digits, value])


class PatchedFile(io.RawIOBase):
    """A file, some of whose bytes are others."""

    def __init__(self, raw: Any, patches: Sequence[Patch]) -> None:
        self._raw, self._patches = raw, patches

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return int(self._raw.seek(offset, whence))

    def tell(self) -> int:
        return int(self._raw.tell())

    def readinto(self, buffer: Any) -> int:
        place = self._raw.tell()
        data = bytearray(self._raw.read(len(buffer)))
        for patch in self._patches:
            first, last = max(place, patch.place), min(place + len(data), patch.place + len(patch.data))
            if first < last:
                data[first - place : last - place] = patch.data[first - patch.place : last - patch.place]
        buffer[: len(data)] = data
        return len(data)
