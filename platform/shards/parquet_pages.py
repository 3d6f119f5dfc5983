"""The pages of token shards, straight to numpy: what pyarrow takes two thirds of its time for is to build the lists'
levels, which in our shards always say the same.

Only the one layout that `tokens.to_parquet` writes: lists, zstd, PLAIN values, data pages of version 1 without a
checksum or statistics. Everything else is UnknownLayout, for pyarrow to read. The format, with Thrift's compact
protocol for the headers: https://parquet.apache.org/docs/file-format/data-pages/ and, in its repository,
src/main/thrift/parquet.thrift (PageHeader), Encodings.md (PLAIN), and rle-bitpacked.md (levels).
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from calumma.platform.shards.tokens import schema

if TYPE_CHECKING:
    from pyarrow.parquet import FileMetaData

# PageHeader: type (data page), sizes uncompressed and compressed, DataPageHeader: number of values, PLAIN, levels RLE
# twice, statistics if any (empty). `\x15` announces the next field as i32, `\x2c` the next but two as a struct.
_HEADER = re.compile(
    rb"\x15\x00 \x15(V) \x15(V) \x2c \x15(V) \x15\x00 \x15\x06 \x15\x06 (?:\x1c\x00)? \x00 \x00".replace(
        b"V", rb"[\x80-\xff]{0,4}[\x00-\x7f]"
    ),
    re.VERBOSE,
)
_TYPES = ("INT32", "BOOLEAN", "INT32")  # of the columns tokens, loss_mask, segments
_LENGTH = 4  # bytes of the length before each of a page's two series of levels
_REPETITION, _DEFINITION = 1, 2  # bits of a level: 0 begins a list; 0 is no list, 1 an empty one, 2 a null within, 3


class UnknownLayout(ValueError):
    """Not pages as our writer lays them out; pyarrow may know them."""


class ColumnChunk(NamedTuple):
    """Where a column of a row group is in the file, and how many values it has by its metadata."""

    begin: int
    end: int
    values: int


class _Page(NamedTuple):
    levels: int  # as many as values, with those that are null
    repetition: bytes
    definition: bytes
    values: memoryview


def is_token_shard(metadata: FileMetaData) -> bool:
    """Whether a file's columns are those of a token shard, lists (that may be null) of values (that may be null)."""
    if not metadata.schema.to_arrow_schema().equals(schema()):
        return False
    columns = [metadata.schema.column(number) for number in range(len(_TYPES))]
    levels = {(column.max_repetition_level, column.max_definition_level) for column in columns}
    return levels == {(1, 3)} and tuple(column.physical_type for column in columns) == _TYPES


def column_chunks(metadata: FileMetaData, row_group: int) -> list[ColumnChunk]:
    """The columns tokens, loss_mask, segments of a file that is a token shard. Raises UnknownLayout."""
    group = metadata.row_group(row_group)
    chunks = []
    for number in range(len(_TYPES)):
        column = group.column(number)
        # Its encodings are told by each page again, and looked at there.
        if column.compression != "ZSTD" or column.has_dictionary_page:
            raise UnknownLayout(f"column {number} is {column.compression}, or has a dictionary")
        begin = column.data_page_offset
        chunks.append(ColumnChunk(begin, begin + column.total_compressed_size, column.num_values))
    return chunks


def decode_equal_lists(chunk: memoryview, values: int, rows: int) -> NDArray[np.int32]:
    """[rows, length], of int32 lists that are all of one length and without nulls; it may not be aligned, nor writable.

    Raises UnknownLayout, and what pyarrow does of data that is no zstd.
    """
    pages = list(_pages(chunk))
    parts = []
    for page in pages:
        if len(page.values) != 4 * page.levels:  # a null has a level, and no value
            raise UnknownLayout(f"{page.levels} values have {len(page.values)} bytes")
        parts.append(np.frombuffer(page.values, np.dtype("<i4")))
    levels = tuple((page.levels, page.repetition) for page in pages)
    if sum(page.levels for page in pages) != values or not rows or _list_count(levels) != rows:
        raise UnknownLayout(f"not {rows} lists of the same length")
    return (parts[0] if len(parts) == 1 else np.concatenate(parts)).reshape(rows, -1)


@functools.lru_cache(maxsize=16)
def all_null(chunk: bytes, rows: int) -> bool:
    """Whether every list of a column is null: that is a few bytes, the same in row groups of as many rows.

    Raises UnknownLayout, and what pyarrow does of data that is no zstd.
    """
    pages = list(_pages(memoryview(chunk)))
    return sum(page.levels for page in pages) == rows and not any(
        len(page.values)
        or _levels(page.repetition, _REPETITION, page.levels).any()
        or _levels(page.definition, _DEFINITION, page.levels).any()
        for page in pages
    )


def _pages(chunk: memoryview) -> Iterator[_Page]:
    import pyarrow as pa

    codec, place = pa.Codec("zstd"), 0
    while place < len(chunk):
        header = _HEADER.match(chunk, place)
        if header is None:
            raise UnknownLayout(f"no page begins {place} bytes into a column")
        size, compressed, count = map(_zigzag, header.groups())
        place = header.end() + compressed
        if place > len(chunk):
            raise UnknownLayout("a page ends behind its column")
        data = memoryview(codec.decompress(chunk[header.end() : place], size))
        repetition, rest = _split_levels(data)
        definition, values = _split_levels(rest)
        yield _Page(count, repetition, definition, values)


def _zigzag(varint: bytes) -> int:
    """Thrift's i32: an unsigned number that is even, and twice the number, unless that is negative (zigzag)."""
    number = _varint(varint, 0)[0]
    if number & 1:
        raise UnknownLayout("a size is negative")
    return number >> 1


def _varint(data: bytes, place: int) -> tuple[int, int]:
    """A number (ULEB128), and where it ends. Raises IndexError."""
    number = shift = 0
    while True:
        byte = data[place]
        number |= (byte & 0x7F) << shift
        place, shift = place + 1, shift + 7
        if byte < 0x80:
            return number, place


def _split_levels(data: memoryview) -> tuple[bytes, memoryview]:
    """Levels, which have their length before them, and what follows."""
    end = _LENGTH + int.from_bytes(data[:_LENGTH], "little")
    if end > len(data):
        raise UnknownLayout("levels end behind their page")
    return bytes(data[_LENGTH:end]), data[end:]


@functools.lru_cache(maxsize=16)
def _list_count(pages: tuple[tuple[int, bytes], ...]) -> int:
    """The number of lists, from their number of values and repetition levels by page; 0 where their lengths differ.

    These are the same bytes in most row groups, so that they are seldom looked into.
    """
    levels = np.concatenate([_levels(data, _REPETITION, count) for count, data in pages])
    begins = np.flatnonzero(levels == 0)
    ends = np.append(begins[1:], len(levels))
    return len(begins) if len(begins) and begins[0] == 0 and len(set((ends - begins).tolist())) == 1 else 0


def _levels(data: bytes, width: int, count: int) -> NDArray[np.uint8]:
    """[count] levels of some bits: runs of a repeated one, and of eights that are packed. Raises UnknownLayout."""
    runs, decoded, place = [np.zeros(0, np.uint8)], 0, 0
    try:
        while decoded < count:
            header, place = _varint(data, place)
            if header & 1:
                end = place + (header >> 1) * width
                bits = np.unpackbits(np.frombuffer(data[place:end], np.uint8), bitorder="little")
                run = bits.reshape(-1, width) @ (1 << np.arange(width, dtype=np.uint8))
            else:
                end = place + 1
                run = np.full(min(header >> 1, count), data[place], np.uint8)
            runs.append(run)
            decoded, place = decoded + len(run), end
    except IndexError as error:
        raise UnknownLayout("there are fewer levels than values") from error
    return np.concatenate(runs)[:count]
