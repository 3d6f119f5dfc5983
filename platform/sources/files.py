"""What readers take and give: an opened `File`, and the drafts of documents or the bad inputs found in it."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

from calumma.model.document import Document, Image, Role, Text
from calumma.platform.sources import compression
from calumma.platform.sources.names import escaped, valid_words
from calumma.platform.sources.notes import Notes
from calumma.platform.storage import StorageError

BUFFER = 1 << 20
LICENSES = ("license", "licenses", "max_stars_repo_licenses", "detected_licenses")  # the last two: The Stack
ABOUT_FIELDS = (*LICENSES, "url", "metadata", "meta")  # of any record: where its license and URL stand
ABOUT = frozenset(ABOUT_FIELDS)


class Malformed(ValueError):
    """A record, or a file, is not what its format requires; the message says in what."""


@dataclass(frozen=True)
class BadInput:
    """One input that is no document. `name` is the file and the place in it; `bytes_lost` counts what a damaged file
    hides behind the damage, in bytes of that file (0 for a single bad item). Both are words in valid Unicode."""

    name: str
    reason: str
    bytes_lost: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", valid_words(self.name))  # of a reader that does not use File.at
        object.__setattr__(self, "reason", valid_words(self.reason))


Item = Document | BadInput


@dataclass(frozen=True)
class Reference:
    """An image that the data only names: a data URL, or a path below the source's images. The `others` are the same
    image, worse, for where the target cannot be had."""

    target: str
    caption: str | None = None
    role: Role | None = None
    optional: bool = False  # left out where it cannot be had; otherwise the document is bad
    trained: bool = True
    others: tuple[str, ...] = ()


DraftSegment = Text | Image | Reference


@dataclass(frozen=True)
class Draft:
    """A document as a reader finds it. `name` is the file and the place in it."""

    segments: tuple[DraftSegment, ...]
    name: str
    license: str = ""
    url: str = ""

    @classmethod
    def from_record(cls, segments: Sequence[DraftSegment], name: str, row: Mapping[str, Any] | None = None) -> Draft:
        """With the license and URL that a record, or the `metadata` or `meta` in it, tells."""
        if row is None or ABOUT.isdisjoint(row):
            return cls(tuple(segments), name)
        return cls(tuple(segments), name, _first_value(row, LICENSES), _first_value(row, ("url",)))


class File:
    """One opened file of a source. References in it are paths below `images`, a folder. What a reader leaves unread it
    counts in `notes`."""

    def __init__(self, uri: str, raw: io.BufferedIOBase, images: str, notes: Notes | None = None) -> None:
        self.uri = uri
        self.raw = raw  # seekable, as it is stored
        self.images = images
        self.notes = Notes() if notes is None else notes

    def at(self, place: str) -> str:
        """The name of a place in this file."""
        return f"{self.name}: {escaped(place)}"

    @cached_property
    def name(self) -> str:
        """The URI as it is told."""
        return escaped(self.uri)

    @property
    def plain_name(self) -> str:
        """The URI in lower case without a suffix of compression."""
        name = compression.plain_archive(self.uri)
        return next((name.removesuffix(suffix) for suffix in compression.SUFFIXES if name.endswith(suffix)), name)

    @cached_property
    def size(self) -> int:
        """Bytes, as stored."""
        place = self.raw.tell()
        size = self.raw.seek(0, io.SEEK_END)
        self.raw.seek(place)
        return size

    @property
    def bytes_left(self) -> int:
        """Bytes that have not been read yet, as stored; of a compressed file, those not decompressed yet."""
        return max(0, self.size - (self.raw if self.codec else self.content).tell())

    @cached_property
    def codec(self) -> str | None:
        """How the file is compressed, if it is."""
        place = self.raw.tell()
        self.raw.seek(0)
        head = self.raw.read(512)
        self.raw.seek(place)
        codec = compression.codec_of(head[:16], self.uri)
        if codec is not None and head[257:262] == b"ustar":
            self.notes.warn(self.uri, "it is called packed, and is not")  # a tar archive as it is
            return None
        return codec

    @cached_property
    def content(self) -> io.BufferedReader:
        """The content from its beginning, decompressed where it is compressed, a buffer at a time.

        Reading it raises compression.Damaged, an OSError, where a compressed file is damaged or cut, when all before is
        read; reading may go on behind it. Raises StorageError for faults of storage.
        """
        self.raw.seek(0)
        if self.codec is None:
            raw = self.raw
            return raw if isinstance(raw, io.BufferedReader) else io.BufferedReader(cast(Any, raw), BUFFER)
        stream = compression.DecompressedStream(
            self.raw, self.codec, lambda what: self.notes.warn(self.uri, what), self.uri
        )
        return io.BufferedReader(stream, BUFFER)

    def damage(self, name: str, error: OSError) -> tuple[BadInput, bool]:
        """What reading `content` raised, as a bad input, and whether nothing more can be read."""
        if not isinstance(error, compression.Damaged):
            return BadInput(name, f"the file is damaged from here on: {error}", self.bytes_left), True
        where = "from here on" if error.ends else "here"
        return BadInput(name, f"the file is damaged {where}: {error}", error.bytes_lost), error.ends

    def read_all(self, limit: int) -> bytes:
        """All of a small file. Raises Malformed when it holds more than `limit` bytes or cannot be decompressed."""
        try:
            data = self.content.read(limit + 1)
            if len(data) <= limit:
                data += self.content.read(1)  # damage is told behind what was read
        except StorageError:
            raise
        except OSError as error:
            raise Malformed(f"cannot be decompressed: {error}") from error
        if len(data) > limit:
            raise Malformed(f"holds more than {limit:,} bytes")
        return data


def field_names(row: Mapping[str, Any]) -> str:
    """The fields of a record, for a message."""
    return ", ".join(map(str, list(row)[:10])) or "nothing"


def json_type(value: Any) -> str:
    """The type of a JSON value, for a message."""
    kinds = {dict: "an object", list: "a list", str: "a string", bool: "a truth value", type(None): "null"}
    return kinds.get(type(value), "a number" if isinstance(value, int | float) else type(value).__name__)


def text_or_none(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _first_value(row: Mapping[str, Any], fields: Sequence[str]) -> str:
    for place in (row, row.get("metadata"), row.get("meta")):
        if isinstance(place, dict):  # as all readers give them; asking for a Mapping takes five times as long
            for field in fields:
                value = place.get(field)
                if isinstance(value, str) and value:
                    return value
                if isinstance(value, list) and value and all(isinstance(part, str) for part in value):
                    return ", ".join(value)
    return ""
