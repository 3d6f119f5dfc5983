"""Compressed files: gzip, zstd, xz and bzip2, decompressed a little at a time, and what damage leaves of them.

Whatever was decompressed before damage is handed out before it is told, as `Damaged`; reading may go on where a later
member (or frame, or stream) can be found. What follows the last member is no content: zeros and other bytes are ignored
with a warning, as gzip does.
"""

from __future__ import annotations

import bz2
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

SUFFIXES = {".gz": "gzip", ".zst": "zstd", ".xz": "xz", ".bz2": "bzip2"}
ARCHIVES = {".tgz": ".tar.gz", ".tzst": ".tar.zst", ".txz": ".tar.xz", ".tbz2": ".tar.bz2", ".tbz": ".tar.bz2"}
PIECE = 64 << 10  # bytes that are read at once
SMALL_PIECE = 4 << 10  # of codecs that cannot say where in it an error is
OUTPUT = 256 << 10  # bytes that are decompressed at once, about
LONGEST_WINDOW = 1 << 31  # bytes of memory: what `zstd --long=31` makes
SEARCHED_BACK = 1 << 20  # an error shows after what is damaged, maybe in the next member already
PROOF = 4096  # bytes that a member, found by its first bytes, must give


class Damaged(OSError):
    """Compressed data is damaged here. `bytes_lost` counts bytes as stored; `ends`: nothing behind can be read."""

    def __init__(self, reason: str, bytes_lost: int, ends: bool) -> None:
        super().__init__(reason)
        self.bytes_lost = bytes_lost
        self.ends = ends


class _Broken(Exception):
    """A member breaks off, so many bytes before the source's position."""

    def __init__(self, reason: str, before: int = 0) -> None:
        super().__init__(reason)
        self.before = before


class _Source:
    """The stored bytes, with a look ahead."""

    def __init__(self, raw: io.BufferedIOBase) -> None:
        self._raw = raw
        self._raw.seek(0)
        self._ahead = b""
        self.position = 0

    def peek(self, size: int) -> bytes:
        """The next bytes; fewer at the end."""
        while len(self._ahead) < size and (more := self._raw.read(max(PIECE, size - len(self._ahead)))):
            self._ahead += more
        return self._ahead[:size]

    def read(self, size: int) -> bytes:
        """At most so many bytes, and none at the end."""
        data = self.peek(size)
        self._ahead = self._ahead[len(data) :]
        self.position += len(data)
        return data

    def back(self, data: bytes) -> None:
        """Read these bytes, the last that were read, again."""
        self._ahead = data + self._ahead
        self.position -= len(data)

    def seek(self, position: int) -> None:
        self._raw.seek(position)
        self._ahead, self.position = b"", position


# -- the codecs: each gives the content of one member and leaves the source behind it, or raises _Broken ---------------


def _gzip(source: _Source) -> Iterator[bytes]:
    decoder = zlib.decompressobj(31)
    while not decoder.eof:
        data = source.read(PIECE)
        if not data:
            raise _Broken("it is cut off")
        while data and not decoder.eof:
            before = decoder.copy()
            try:
                content = decoder.decompress(data, OUTPUT)
            except zlib.error as error:
                content, left = _before_error(before, data)
                yield content
                raise _Broken(_reason(error), left) from error
            data = decoder.unconsumed_tail
            yield content
    source.back(decoder.unused_data)


def _before_error(decoder: Any, data: bytes) -> tuple[bytes, int]:
    """What can be decompressed before an error, and how many bytes of `data` remain."""
    parts: list[bytes] = []
    most = OUTPUT
    while most:
        before = decoder.copy()
        try:
            parts.append(decoder.decompress(data, most))
            data = decoder.unconsumed_tail
        except zlib.error:
            decoder, most = before, most // 16 or int(most > 1)
    return b"".join(parts), len(data)


def _zstd(source: _Source) -> Iterator[bytes]:
    """Block by block, so that an error costs no block before it."""
    import zstandard

    head = source.peek(18)
    if head[1:4] == ZSTD_SKIPPED[1:] and head[0] & 0xF0 == 0x50:
        source.read(8)
        left = int.from_bytes(head[4:8], "little")
        while left and (data := source.read(min(left, PIECE))):
            left -= len(data)
        if left or len(head) < 8:
            raise _Broken("it is cut off")
        return
    if len(head) < 6:
        raise _Broken("it is cut off")
    single, checksum = bool(head[4] & 32), bool(head[4] & 4)
    sizes = (0, 1, 2, 4)[head[4] & 3], (int(single), 2, 4, 8)[head[4] >> 6]
    try:
        window = zstandard.get_frame_parameters(head).window_size
        if window > LONGEST_WINDOW:
            most = f"at most {LONGEST_WINDOW >> 20:,} are read"
            advice = f"compress it again with zstd --long={LONGEST_WINDOW.bit_length() - 1} or less"
            raise _Broken(f"it asks for a window of {window >> 20:,} MiB; {most}; {advice}")
        decoder = zstandard.ZstdDecompressor(max_window_size=LONGEST_WINDOW).decompressobj()
        yield decoder.decompress(source.read(5 + (not single) + sum(sizes)))
        last = False
        while not last:
            block = source.peek(3)
            if len(block) < 3:
                raise _Broken("it is cut off")
            last, kind, size = bool(block[0] & 1), block[0] >> 1 & 3, int.from_bytes(block, "little") >> 3
            length = 3 + (1 if kind == 1 else size)
            block = source.read(length)
            yield decoder.decompress(block)
            if len(block) < length:
                raise _Broken("it is cut off")
        if checksum:
            if len(end := source.read(4)) < 4:
                raise _Broken("it is cut off")
            yield decoder.decompress(end)
    except zstandard.ZstdError as error:
        raise _Broken(_reason(error)) from error


def _xz(source: _Source) -> Iterator[bytes]:
    return _small_pieces(source, lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ))


def _bzip2(source: _Source) -> Iterator[bytes]:
    return _small_pieces(source, bz2.BZ2Decompressor)


def _small_pieces(source: _Source, make: Callable[[], Any]) -> Iterator[bytes]:
    start, given = source.position, 0
    decoder = make()
    while not decoder.eof:
        data = source.read(SMALL_PIECE) if decoder.needs_input else b""
        if decoder.needs_input and not data:
            raise _Broken("it is cut off")
        try:
            content = decoder.decompress(data, OUTPUT)
        except (lzma.LZMAError, OSError, ValueError) as error:
            end = source.position
            yield _again(source, start, make(), given)
            source.seek(end)
            raise _Broken(_reason(error), len(data)) from error
        given += len(content)
        yield content
    source.back(decoder.unused_data)


def _again(source: _Source, start: int, decoder: Any, given: int) -> bytes:
    """What a member gives between its first `given` bytes and its error: a decoder that fails keeps what it had."""
    source.seek(start)
    rest = bytearray()
    try:
        while not decoder.eof:
            data = source.read(SMALL_PIECE) if decoder.needs_input else b""
            content = decoder.decompress(data, min(OUTPUT, given) or 1)
            if given:
                given -= len(content)
            else:
                rest += content
    except (lzma.LZMAError, OSError, ValueError):
        pass
    return bytes(rest)


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


@dataclass(frozen=True)
class _Codec:
    magic: bytes
    member: Callable[[_Source], Iterator[bytes]]

    def starts(self, head: bytes) -> bool:
        return head.startswith(self.magic) or (
            self.magic == ZSTD and head[1:4] == ZSTD_SKIPPED[1:] and head[:1] != b"" and head[0] & 0xF0 == 0x50
        )

    def almost_starts(self, head: bytes) -> bool:
        """Whether all of the first bytes but one are those of a member."""
        equal = sum(a == b for a, b in zip(head, self.magic, strict=False))
        return equal == len(self.magic) - 1


ZSTD, ZSTD_SKIPPED = b"\x28\xb5\x2f\xfd", b"\x50\x2a\x4d\x18"
CODECS = {
    "gzip": _Codec(b"\x1f\x8b\x08", _gzip),
    "zstd": _Codec(ZSTD, _zstd),
    "xz": _Codec(b"\xfd7zXZ\x00", _xz),
    "bzip2": _Codec(b"BZh", _bzip2),
}


def codec_of(head: bytes, uri: str) -> str | None:
    """The codec that a file's first bytes, or else its name, tell."""
    by_name = SUFFIXES.get(next((suffix for suffix in SUFFIXES if plain_archive(uri).endswith(suffix)), ""))
    by_content = (name for name, codec in CODECS.items() if codec.starts(head) and _sure(name, head))
    return next(by_content, by_name)


def _sure(name: str, head: bytes) -> bool:
    return name != "bzip2" or head[4:10] in (b"1AY&SY", b"\x17rE8P\x90")  # three letters may begin a text


def plain_archive(uri: str) -> str:
    """A name in lower case, with the suffixes of a packed archive in full: `.tgz` is `.tar.gz`."""
    name = uri.lower()
    return next((name.removesuffix(short) + long for short, long in ARCHIVES.items() if name.endswith(short)), name)


class DecompressedStream(io.RawIOBase):
    """The content of a compressed file. Reading raises Damaged where it is damaged, once for each damage, and what the
    storage raises. A line that damage cuts is given, as if the file ended, before it is told."""

    def __init__(self, raw: io.BufferedIOBase, codec: str, warn: Callable[[str], None]) -> None:
        self._source = _Source(raw)
        self._name, self._codec, self._warn = codec, CODECS[codec], warn
        self._pieces = self._content()
        self._rest = memoryview(b"")
        self._in_line = False
        self._damage: Damaged | None = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._rest:
            if self._damage is not None:
                damage, self._damage = self._damage, None
                raise damage
            piece = next(self._pieces, None)
            if piece is None:
                return 0
            if isinstance(piece, Damaged):
                self._damage = piece
                if self._in_line:
                    self._in_line = False
                    return 0
            else:
                self._rest = memoryview(piece)
        part = self._rest[: len(buffer)]
        buffer[: len(part)] = part
        self._rest = self._rest[len(part) :]
        self._in_line = part[-1] != 0x0A
        return len(part)

    def readall(self) -> bytes:
        parts: list[bytes] = []
        self._in_line = False
        while data := self.read(OUTPUT):
            parts.append(data)
            self._in_line = False  # damage is told: who takes all wants to know
        return b"".join(parts)

    def _content(self) -> Iterator[bytes | Damaged]:
        source = self._source
        begin = True
        while (head := source.peek(16)) or begin:
            start = source.position
            if not self._codec.starts(head):
                if not begin and not self._behind_the_end():
                    continue
                start = source.position
                reason = f"no {self._name} begins here" if head else "it is empty"
                yield self._damaged(reason, start, start)
            else:
                try:
                    yield from (part for part in self._codec.member(source) if part)
                except _Broken as error:
                    yield self._damaged(str(error), start, source.position - error.before)
            begin = False

    def _behind_the_end(self) -> bool:
        """Skip what is no member behind the last one, with a warning; whether it is a damaged member instead."""
        source = self._source
        zeros = 0
        while (data := source.peek(PIECE)) and not data.strip(b"\0"):
            zeros += len(source.read(len(data)))
        zeros += len(source.read(len(data) - len(data.lstrip(b"\0"))))
        head = source.peek(16)
        if not head:
            if self._name != "xz" or zeros % 4:  # xz pads its streams
                self._warn(f"{zeros:,} bytes of zeros after its end are ignored")
            return False
        if self._codec.starts(head):
            return False
        start = source.position
        found = self._seek_member(start)
        if self._codec.almost_starts(head) or found:
            source.seek(start)
            return True
        source.seek(start)
        others = 0
        while data := source.read(PIECE):
            others += len(data)
        self._warn(f"{others:,} bytes after its end are ignored: they are no {self._name}")
        return False

    def _damaged(self, reason: str, start: int, position: int) -> Damaged:
        """The damage of a member that begins at `start`, found at `position`; the source stands behind it."""
        found = self._seek_member(max(start + 1, position - SEARCHED_BACK))
        return Damaged(reason, max(1, self._source.position - position), not found)

    def _seek_member(self, position: int) -> bool:
        """Go to the next member at or behind a position, or to the end."""
        source = self._source
        source.seek(position)
        while data := source.peek(PIECE):
            place = data.find(self._codec.magic)
            if place < 0:
                source.read(max(1, len(data) - len(self._codec.magic)))
                continue
            source.read(place)
            candidate = source.position
            proven = self._gives_content()
            source.seek(candidate)
            if proven:
                return True
            source.read(1)
        return False

    def _gives_content(self) -> bool:
        size = 0
        try:
            for part in self._codec.member(self._source):
                size += len(part)
                if size >= PROOF:
                    return True
        except _Broken:
            return False
        return True
