"""The codecs: gzip, zstd, xz and bzip2. Each gives the content of one member, a little at a time, and leaves the source
behind it, or raises Broken."""

from __future__ import annotations

import bz2
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from typing import Any

PIECE = 64 << 10  # bytes that are read at once
SMALL_PIECE = 4 << 10  # of codecs that cannot say where in it an error is
OUTPUT = 256 << 10  # bytes that are decompressed at once, about
LONGEST_WINDOW = 1 << 31  # bytes of memory: what `zstd --long=31` makes
ZSTD, ZSTD_SKIPPED = b"\x28\xb5\x2f\xfd", b"\x50\x2a\x4d\x18"


class Broken(Exception):
    """A member breaks off, so many bytes before the source's position."""

    def __init__(self, reason: str, before: int = 0) -> None:
        super().__init__(reason)
        self.before = before


class Source:
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


def gzip(source: Source) -> Iterator[bytes]:
    return inflated(source, 31)


def inflated(source: Source, window: int) -> Iterator[bytes]:
    """Of a stream of zlib's, whose `window` says what stands around it."""
    decoder = zlib.decompressobj(window)
    while not decoder.eof:
        data = source.read(PIECE)
        if not data:
            raise Broken("it is cut off")
        while data and not decoder.eof:
            before = decoder.copy()
            try:
                content = decoder.decompress(data, OUTPUT)
            except zlib.error as error:
                content, left = _before_error(before, data)
                yield content
                raise Broken(_reason(error), left) from error
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


def zstd(source: Source) -> Iterator[bytes]:
    """Block by block, so that an error costs no block before it."""
    import zstandard

    head = source.peek(18)
    if head[1:4] == ZSTD_SKIPPED[1:] and head[0] & 0xF0 == 0x50:
        source.read(8)
        left = int.from_bytes(head[4:8], "little")
        while left and (data := source.read(min(left, PIECE))):
            left -= len(data)
        if left or len(head) < 8:
            raise Broken("it is cut off")
        return
    if len(head) < 6:
        raise Broken("it is cut off")
    single, checksum = bool(head[4] & 32), bool(head[4] & 4)
    sizes = (0, 1, 2, 4)[head[4] & 3], (int(single), 2, 4, 8)[head[4] >> 6]
    try:
        window = zstandard.get_frame_parameters(head).window_size
        if window > LONGEST_WINDOW:
            most = f"at most {LONGEST_WINDOW >> 20:,} are read"
            advice = f"compress it again with zstd --long={LONGEST_WINDOW.bit_length() - 1} or less"
            raise Broken(f"it asks for a window of {window >> 20:,} MiB; {most}; {advice}")
        decoder = zstandard.ZstdDecompressor(max_window_size=LONGEST_WINDOW).decompressobj()
        yield decoder.decompress(source.read(5 + (not single) + sum(sizes)))
        last = False
        while not last:
            block = source.peek(3)
            if len(block) < 3:
                raise Broken("it is cut off")
            last, kind, size = bool(block[0] & 1), block[0] >> 1 & 3, int.from_bytes(block, "little") >> 3
            length = 3 + (1 if kind == 1 else size)
            block = source.read(length)
            yield decoder.decompress(block)
            if len(block) < length:
                raise Broken("it is cut off")
        if checksum:
            if len(end := source.read(4)) < 4:
                raise Broken("it is cut off")
            yield decoder.decompress(end)
    except zstandard.ZstdError as error:
        raise Broken(_reason(error)) from error


def xz(source: Source) -> Iterator[bytes]:
    return _small_pieces(source, lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ))


def bzip2(source: Source) -> Iterator[bytes]:
    return _small_pieces(source, bz2.BZ2Decompressor)


def _small_pieces(source: Source, make: Callable[[], Any]) -> Iterator[bytes]:
    start, given = source.position, 0
    decoder = make()
    while not decoder.eof:
        data = source.read(SMALL_PIECE) if decoder.needs_input else b""
        if decoder.needs_input and not data:
            raise Broken("it is cut off")
        try:
            content = decoder.decompress(data, OUTPUT)
        except (lzma.LZMAError, OSError, ValueError) as error:
            end = source.position
            yield _again(source, start, make(), given)
            source.seek(end)
            raise Broken(_reason(error), len(data)) from error
        given += len(content)
        yield content
    source.back(decoder.unused_data)


def _again(source: Source, start: int, decoder: Any, given: int) -> bytes:
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
