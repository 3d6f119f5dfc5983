"""The content of compressed files, and what damage leaves of it.

Whatever was decompressed before damage is handed out before it is told, as `Damaged`; reading may go on where a later
member (or frame, or stream) can be found. What follows the last member is no content: zeros and other bytes are ignored
with a warning, as gzip does.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from typing import Any

from calumma.platform.sources.compression.codecs import OUTPUT, PIECE, Broken, Source
from calumma.platform.sources.compression.table import CODECS, plain_archive

SEARCHED_BACK = 1 << 20  # an error shows after what is damaged, maybe in the next member already
PROOF = 4096  # bytes that a member, found by its first bytes, must give


class Damaged(OSError):
    """Compressed data is damaged here. `bytes_lost` counts bytes as stored; `ends`: nothing behind can be read."""

    def __init__(self, reason: str, bytes_lost: int, ends: bool) -> None:
        super().__init__(reason)
        self.bytes_lost = bytes_lost
        self.ends = ends


class DecompressedStream(io.RawIOBase):
    """The content of a compressed file. Reading raises Damaged where it is damaged, once for each damage, and what the
    storage raises. A line that damage cuts is given, as if the file ended, before it is told."""

    def __init__(self, raw: io.BufferedIOBase, codec: str, warn: Callable[[str], None], uri: str = "") -> None:
        """`warn` is told what of it is ignored. `uri`: its name, which says which entries of a zip file are read."""
        self._source = Source(raw)
        self._plain = plain_archive(uri)
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
        begin, cut, last = True, bool(self._codec.ends), b""
        while (head := source.peek(16)) or begin:
            start = source.position
            if self._codec.ends and head.startswith(self._codec.ends):
                return
            if not self._codec.starts(head):
                if not begin and not self._behind_the_end():
                    continue
                start = source.position
                reason = f"no {self._name} begins here" if head else "it is empty"
                yield (damage := self._damaged(reason, start, start))
                cut = cut and not damage.ends
            else:
                unread = self._codec.unread(source, self._plain)
                if unread is not None:
                    self._warn(f"{unread} in it is not read")
                elif self._codec.ends and last not in (b"", b"\n"):
                    yield b"\n"  # the entries of a zip file are files of their own
                try:
                    for part in self._codec.member(source):
                        if part and unread is None:
                            last = part[-1:]
                            yield part
                except Broken as error:
                    yield (damage := self._damaged(str(error), start, source.position - error.before))
                    cut = cut and not damage.ends
            begin = False
        if cut:
            yield Damaged("it is cut off: the directory at its end is not there", 1, True)

    def _behind_the_end(self) -> bool:
        """Skip what is no member behind the last one, with a warning; whether it is a damaged member instead."""
        source = self._source
        zeros = 0
        while (data := source.peek(PIECE)) and not data.strip(b"\0"):
            zeros += len(source.read(len(data)))
        zeros += len(source.read(len(data) - len(data.lstrip(b"\0"))))
        head = source.peek(16)
        if not head:
            if (self._name != "xz" or zeros % 4) and not self._codec.ends:  # xz pads its streams
                self._warn(f"{zeros:,} bytes of zeros after its end are ignored")
            return False
        if self._codec.starts(head):
            return False
        if self._codec.ends:
            return not head.startswith(self._codec.ends)
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
        except Broken:
            return False
        return True
