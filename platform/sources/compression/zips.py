"""Zip files of records, such as Multimodal C4's `.jsonl.zip`: each entry is a member, read from where it stands, so
that damage costs what is damaged. The directory at the end is not needed.

https://pkware.cachefly.net/webdocs/casestudies/APPNOTE.TXT
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath

from calumma.platform.sources.compression.codecs import PIECE, Broken, Source, inflated
from calumma.platform.sources.names import hidden_part

LOCAL, DESCRIPTOR = b"PK\x03\x04", b"PK\x07\x08"
ENDS = (b"PK\x01\x02", b"PK\x05\x06", b"PK\x06\x06")  # the directory, or its end where there is no entry
HEADER = struct.Struct("<4s5H3I2H")
STORED, DEFLATED = 0, 8
ENCRYPTED, SIZES_BEHIND, UTF8 = 1, 8, 1 << 11  # flags
WIDE = 0xFFFFFFFF  # the size stands in the extra field
ALIKE = frozenset({".json", ".jsonl", ".ndjson"})


@dataclass(frozen=True)
class _Entry:
    name: str
    flags: int
    method: int
    checksum: int
    packed: int
    size: int
    header: int  # bytes


def _entry(source: Source) -> _Entry:
    """What the header says that begins here; nothing is taken. Raises Broken."""
    head = source.peek(HEADER.size)
    if len(head) < HEADER.size:
        raise Broken("it is cut off")
    _, _, flags, method, _, _, checksum, packed, size, named, more = HEADER.unpack(head)
    whole = source.peek(HEADER.size + named + more)
    name = whole[HEADER.size : HEADER.size + named].decode("utf-8" if flags & UTF8 else "cp437", "replace")
    extra = whole[HEADER.size + named :]
    while len(extra) >= 4:
        kind, length = struct.unpack("<2H", extra[:4])
        if kind == 1:  # of zip64: of the sizes those that are wide, in this order
            wide = [int.from_bytes(extra[at : at + 8], "little") for at in range(4, 4 + length, 8)]
            size = wide.pop(0) if size == WIDE and wide else size
            packed = wide.pop(0) if packed == WIDE and wide else packed
        extra = extra[4 + length :]
    return _Entry(name, flags, method, checksum, packed, size, HEADER.size + named + more)


def unread(source: Source, name: str) -> str | None:
    """The name of the entry that begins here, unless it is of the kind that the zip file's name (`a.jsonl.zip`) says,
    or a folder."""
    try:
        entry = _entry(source).name
    except Broken:
        return None
    kinds = {PurePosixPath(each.lower()).suffix for each in (entry, name.removesuffix(".zip"))} - {""}
    fits = hidden_part(entry) is None and (len(kinds) < 2 or kinds <= ALIKE)
    return None if fits or entry.endswith("/") else entry


def member(source: Source) -> Iterator[bytes]:
    entry = _entry(source)
    source.read(entry.header)
    if entry.flags & ENCRYPTED:
        raise Broken(f"{entry.name} is encrypted")
    if entry.method not in (STORED, DEFLATED):
        raise Broken(f"{entry.name} is packed by method {entry.method}; pack it again with `zip`, or as .gz or .zst")
    if entry.method == STORED and entry.flags & SIZES_BEHIND:
        raise Broken(f"{entry.name} is stored, and its length is not told; pack it again with `zip`")
    start, size, checksum = source.position, 0, 0
    for part in _stored(source, entry.packed) if entry.method == STORED else inflated(source, -15):
        size += len(part)
        checksum = zlib.crc32(part, checksum)
        yield part
    packed = source.position - start
    expected = entry.checksum, entry.packed, entry.size
    if entry.flags & SIZES_BEHIND:
        expected = _descriptor(source, packed, size)
    if expected != (checksum, packed, size):
        raise Broken(f"the checksum or the length of {entry.name} is another", source.position - start)


def _stored(source: Source, left: int) -> Iterator[bytes]:
    while left:
        if not (data := source.read(min(left, PIECE))):
            raise Broken("it is cut off")
        left -= len(data)
        yield data


def _descriptor(source: Source, packed: int, size: int) -> tuple[int, int, int]:
    """Checksum and sizes as they stand behind an entry: in words of 4 bytes, or of 8."""
    data = source.peek(24)
    signed = 4 if data.startswith(DESCRIPTOR) else 0
    for form in ("<3I", "<I2Q"):
        length = struct.calcsize(form)
        said = data[signed : signed + length]
        if len(said) == length:
            checksum, said_packed, said_size = struct.unpack(form, said)
            if (said_packed, said_size) == (packed, size):
                source.read(signed + length)
                return checksum, packed, size
    raise Broken("the lengths behind an entry are others" if len(data) >= signed + 12 else "it is cut off")
