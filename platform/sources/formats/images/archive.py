"""Members of tar archives, packed or not, one after another; behind damage from the next header on that can be found.

https://www.gnu.org/software/tar/manual/html_node/Standard.html. Python's tarfile stops at the first damage, silently
where it was not the first header, and needs a kilobyte for every member it has passed.
"""

from __future__ import annotations

import io
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

from calumma.platform.sources import compression
from calumma.platform.sources.files import BadInput, File
from calumma.platform.sources.names import hidden_part
from calumma.platform.sources.notes import suffix
from calumma.platform.storage import StorageError

BLOCK = tarfile.BLOCKSIZE
CHUNK = 64 << 10  # bytes that are read at once
LARGEST = 1 << 30  # bytes of a member
LARGEST_COPY = 64 << 30  # bytes of a packed archive with hard links; links to what stands behind are bad
MAGIC, MAGIC_AT = b"ustar", 257
LONG_NAME, LONG_LINK = tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK
EXTENDED = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE)
UNREAD = {
    tarfile.SYMTYPE: "symbolic link",
    tarfile.GNUTYPE_SPARSE: "sparse file",
    tarfile.CHRTYPE: "device",
    tarfile.BLKTYPE: "device",
    tarfile.FIFOTYPE: "pipe",
}
OF_MACOS = "._* of macOS"


@dataclass(frozen=True)
class Member:
    """A regular file of an archive, or what stands for one: `problem` says why its content cannot be had."""

    name: str
    data: bytes
    problem: str = ""


def plain_name(name: str) -> str:
    """`./0.jpg` as `0.jpg`: tar writes the one or the other for the same file."""
    while name.startswith("./"):
        name = name[2:].lstrip("/")
    return name


class _Damage(Exception):
    pass


def members(file: File) -> Iterator[Member | BadInput]:
    """The regular files, and a BadInput for each damage. What is no file is counted."""
    return _Archive(file).members()


class _Bytes:
    """The content of a file, with a look ahead. `damage`: what reading came to."""

    def __init__(self, file: File) -> None:
        self._content = file.content
        self._ahead, self._begin = b"", 0  # what is read and where of it the next byte stands
        self.position = 0
        self.damage: OSError | None = None
        self.ends = False  # nothing behind the damage can be read
        self._ended = False

    def peek(self, size: int) -> bytes:
        if len(self._ahead) - self._begin < size and not self._ended:
            self._ahead, self._begin = self._ahead[self._begin :], 0
        while len(self._ahead) - self._begin < size and not self._ended:
            try:
                wanted = max(CHUNK, size - len(self._ahead))
                data = self._content.read1(wanted) or self._content.read1(1)  # damage is told behind the end
            except StorageError:
                raise
            except OSError as error:
                self.damage, data = error, b""
                self.ends = not isinstance(error, compression.Damaged) or error.ends
            self._ended = not data
            self._ahead += data
        return self._ahead[self._begin : self._begin + size]

    def take(self, size: int) -> bytes:
        """Fewer bytes at the end, and at a damage."""
        if size > CHUNK:
            parts = []
            while size > 0 and (part := self.take(min(size, CHUNK))):
                parts.append(part)
                size -= len(part)
            return b"".join(parts)
        data = self.peek(size)
        self._begin += len(data)
        self.position += len(data)
        return data

    def skip(self, size: int) -> int:
        left = size
        while left > 0 and (part := self.take(min(left, CHUNK))):
            left -= len(part)
        return size - left

    def go_on(self) -> None:
        """Behind a damage."""
        self.damage, self._ended, self._ahead, self._begin = None, False, b"", 0


class _Apart(io.RawIOBase):
    """A file read from a place of its own, while others read it."""

    def __init__(self, raw: io.BufferedIOBase) -> None:
        self._raw, self._place = raw, 0

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        place = self._raw.tell()
        if whence == io.SEEK_CUR:
            offset, whence = self._place + offset, io.SEEK_SET
        self._place = self._raw.seek(offset, whence)
        self._raw.seek(place)
        return self._place

    def tell(self) -> int:
        return self._place

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        place = self._raw.tell()
        self._raw.seek(self._place)
        size = self._raw.readinto(buffer)
        self._place = self._raw.tell()
        self._raw.seek(place)
        return size


class _Archive:
    def __init__(self, file: File) -> None:
        self._file = file
        self._bytes = _Bytes(file)
        self._found = False  # any header
        self._links: dict[str, tuple[int, int]] | None = None  # name -> place and size of its content
        self._unpacked: io.BufferedIOBase = file.raw

    def members(self) -> Iterator[Member | BadInput]:
        while True:
            try:
                yield from self._members()
                return
            except _Damage as error:
                damage, ends = self._lost(str(error))
                yield damage
                if ends:
                    return

    def _members(self) -> Iterator[Member]:
        """Up to the end. Raises _Damage with its reason."""
        more: dict[str, str] = {}  # what the next header's extensions say
        while True:
            block = self._bytes.peek(BLOCK)
            if len(block) < BLOCK:
                if not block and self._found and self._bytes.damage is None:
                    raise _Damage("it has no end mark")
                raise _Damage("it is no tar archive" if not self._found else "it breaks off")
            if not block.strip(b"\0"):
                if self._ends():
                    return
                continue
            header = _header(block)
            if header is None:
                raise _Damage("no header of a member stands here" if self._found else "it is no tar archive")
            self._found = True
            self._bytes.take(BLOCK)
            if header.type in (LONG_NAME, LONG_LINK, *EXTENDED, tarfile.XGLTYPE):
                more |= _extension(header, self._content(header))
                continue
            yield from self._member(header, more, bool(block[482]))
            more = {}

    def _member(self, header: tarfile.TarInfo, more: dict[str, str], extended: bool) -> Iterator[Member]:
        """`extended`: the map of a sparse file goes on in further blocks."""
        name = more.get("path", header.name)
        if more.get("size", "").isdecimal():
            header.size = int(more["size"])
        if header.islnk():
            yield self._link(name, more.get("linkpath", header.linkname))
        elif header.type in UNREAD:
            kind = UNREAD[header.type]
            if header.type == tarfile.GNUTYPE_SPARSE:
                while extended:
                    extended = bool(self._bytes.take(BLOCK)[504:505].strip(b"\0"))
                self._skip(header)
            self._file.notes.skip("members", f"{suffix(name)} ({kind})")
        elif header.isreg() and not name.endswith("/"):
            if (hidden := hidden_part(name)) is not None:
                self._skip(header)
                self._file.notes.skip("members", OF_MACOS if hidden in ("._*", "__MACOSX/") else hidden)
            elif header.size > LARGEST and self._file.codec is not None:
                self._skip(header)
                yield Member(name, b"", f"is longer than {LARGEST:,} bytes")
            else:
                yield Member(name, self._content(header))
        elif header.size and not header.isdir():
            self._skip(header)
            self._file.notes.skip("members", f"{suffix(name)} (of type {header.type.decode('latin-1')!r})")

    # -- contents ------------------------------------------------------------------------------------------------------

    def _check(self, header: tarfile.TarInfo) -> None:
        end = self._bytes.position + header.size
        if self._file.codec is None and end > self._file.size:
            raise _Damage(f"{header.name} is {header.size:,} bytes long")

    def _content(self, header: tarfile.TarInfo) -> bytes:
        self._check(header)
        data = self._bytes.take(header.size)
        if len(data) < header.size:
            raise _Damage(f"{header.name} is {header.size:,} bytes long")
        self._bytes.take(-header.size % BLOCK)
        return data

    def _skip(self, header: tarfile.TarInfo) -> None:
        self._check(header)
        if self._bytes.skip(header.size) < header.size:
            raise _Damage(f"{header.name} is {header.size:,} bytes long")
        self._bytes.take(-header.size % BLOCK)

    def _link(self, name: str, target: str) -> Member:
        """A hard link: the content of a member before it."""
        if self._links is None:
            self._unpacked = self._unpack()
            self._links = _contents(self._unpacked)
        if plain_name(target) not in self._links:
            return Member(name, b"", f"is a hard link to {target}, which is not in the archive")
        offset, size = self._links[plain_name(target)]
        if size > LARGEST and self._file.codec is not None:
            return Member(name, b"", f"is longer than {LARGEST:,} bytes")
        place = self._unpacked.tell()
        self._unpacked.seek(offset)
        data = self._unpacked.read(size)
        self._unpacked.seek(place)
        return Member(name, data)

    def _unpack(self) -> io.BufferedIOBase:
        """The archive as it is, of a packed one a copy on the disk, which the first hard link asks for."""
        if self._file.codec is None:
            return self._file.raw
        copy = tempfile.TemporaryFile(prefix="calumma-")  # noqa: SIM115 (lives as long as the archive is read)
        content = _Bytes(File(self._file.uri, io.BufferedReader(_Apart(self._file.raw), CHUNK), self._file.images))
        while True:
            if copy.tell() < LARGEST_COPY and (part := content.take(CHUNK)):
                copy.write(part)
            elif content.damage is None or content.ends or copy.tell() >= LARGEST_COPY:
                return cast(Any, copy)
            else:
                content.go_on()

    # -- ends and damage -----------------------------------------------------------------------------------------------

    def _ends(self) -> bool:
        """Skip blocks of zeros; whether the archive ends there."""
        zeros = 0
        while (block := self._bytes.peek(BLOCK)) and not block.strip(b"\0"):
            zeros += len(self._bytes.take(BLOCK))
        if self._bytes.damage is not None:
            raise _Damage("it breaks off")
        if not block:
            if not self._found and not 2 * BLOCK <= zeros <= tarfile.RECORDSIZE:
                raise _Damage("it is no tar archive")
            if not self._found:
                self._file.notes.warn(self._file.name, "the archive has no members")
            return True
        if _header(block) is not None:
            if self._found:
                self._file.notes.warn(self._file.name, "archives stand in it one after another; all are read")
            return False
        if zeros < 2 * BLOCK or not self._found:
            return False  # a damaged header
        place = self._bytes.position
        if self._seek_header():
            raise _Damage("no header of a member stands here")
        if self._bytes.damage is not None:
            raise _Damage("it breaks off")
        others = self._bytes.position - place
        self._file.notes.warn(self._file.name, f"{others:,} bytes after the archive's end are ignored")
        return True

    def _lost(self, reason: str) -> tuple[BadInput, bool]:
        """The damage, with the bytes up to the next header, and whether there is none."""
        size, place = self._file.size, self._bytes.position
        found = self._seek_header()
        if not self._found and not found and self._bytes.damage is None:
            return BadInput(self._file.name, f"not a readable tar archive: {reason}", size), True
        lost, name = self._bytes.position - place, self._file.name
        if self._bytes.damage is not None:
            damage, ends = self._file.damage(name, self._bytes.damage)
            self._bytes.go_on()
            found = not ends and self._seek_header()
            return BadInput(name, damage.reason, min(size, lost + damage.bytes_lost)), not found
        if found:
            return BadInput(name, f"the archive is damaged from byte {place:,} on, for {lost:,}: {reason}", lost), False
        total = size if self._file.codec is None else self._bytes.position
        said = f"the archive breaks off after byte {place:,} of {total:,}: {reason}"
        return BadInput(name, said, min(size, lost)), True

    def _seek_header(self) -> bool:
        """Go to the next header, wherever it stands, or to the end or a damage."""
        while data := self._bytes.peek(CHUNK):
            place = data.find(MAGIC)
            while place >= 0:
                begin = place - MAGIC_AT
                if begin >= 0:
                    self._bytes.take(begin)
                    if _header(self._bytes.peek(BLOCK)) is not None:
                        return True
                    self._bytes.take(1)
                    data = self._bytes.peek(CHUNK)
                    place = -1
                place = data.find(MAGIC, place + 1)
            if len(data) < CHUNK:
                self._bytes.take(len(data))
                return False
            self._bytes.take(CHUNK - MAGIC_AT - len(MAGIC))
        return False


def _header(block: bytes) -> tarfile.TarInfo | None:
    """The header that a block is; None for a damaged one, and for zeros."""
    try:
        header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except (tarfile.HeaderError, ValueError):
        return None
    return header if header.size >= 0 else None


def _extension(header: tarfile.TarInfo, data: bytes) -> dict[str, str]:
    """What a header before a member's own says of it. Raises _Damage."""
    if header.type in (LONG_NAME, LONG_LINK):
        text = data.rstrip(b"\0").decode("utf-8", "surrogateescape")
        return {"path" if header.type == LONG_NAME else "linkpath": text}
    if header.type == tarfile.XGLTYPE:
        return {}  # of the whole archive: a comment, as git writes it
    said: dict[str, str] = {}
    while data.strip(b"\0"):
        digits, _, _ = data.partition(b" ")
        length = int(digits) if digits.isdigit() and len(digits) < 12 else 0
        record = data[len(digits) + 1 : length - 1]
        key, equals, value = record.partition(b"=")
        if not equals or length > len(data) or data[length - 1 : length] != b"\n":
            raise _Damage(f"the extended header {header.name} is damaged")
        said[key.decode("utf-8", "surrogateescape")] = value.decode("utf-8", "surrogateescape")
        data = data[length:]
    return said


def _contents(raw: io.BufferedIOBase) -> dict[str, tuple[int, int]]:
    """Name -> place and size of the regular files of an archive that is not packed."""
    place = raw.tell()
    whole = raw.seek(0, io.SEEK_END)
    raw.seek(0)
    found: dict[str, tuple[int, int]] = {}
    try:
        with tarfile.open(fileobj=cast(Any, raw), mode="r:", errors="surrogateescape", encoding="utf-8") as tar:
            while (member := tar.next()) is not None:
                if member.isreg() and member.offset_data + member.size <= whole:
                    found[plain_name(member.name)] = (member.offset_data, member.size)
                cast(Any, tar).members.clear()
    except (tarfile.TarError, EOFError, ValueError):
        pass  # links to what stands behind damage are bad
    finally:
        raw.seek(place)
    return found
