"""What readers take and give: an opened `File`, and the drafts of documents or the bad inputs found in it."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

from calumma.model.document import Document, Image, Role, Text
from calumma.platform.sources.notes import Notes
from calumma.platform.storage import StorageError

COMPRESSED = {".gz": "gzip", ".zst": "zstd"}  # suffix -> name of the codec in Arrow
MAGIC_BYTES = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd"}
BUFFER = 1 << 20
LICENSES = ("license", "licenses", "max_stars_repo_licenses", "detected_licenses")  # the last two: The Stack


class Malformed(ValueError):
    """A record, or a file, is not what its format requires; the message says in what."""


@dataclass(frozen=True)
class BadInput:
    """One input that is no document. `name` is the file and the place in it; `bytes_lost` counts what a damaged file
    hides behind the damage, in bytes of that file (0 for a single bad item)."""

    name: str
    reason: str
    bytes_lost: int = 0


Item = Document | BadInput


@dataclass(frozen=True)
class Reference:
    """An image that the data only names: a data URL, or a path below the source's images."""

    target: str
    caption: str | None = None
    role: Role | None = None
    optional: bool = False  # left out where it cannot be had; otherwise the document is bad


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
        if row is None:
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
        return f"{self.uri}: {place}"

    @property
    def plain_name(self) -> str:
        """The URI in lower case without a suffix of compression."""
        name = self.uri.lower()
        return next((name.removesuffix(suffix) for suffix in COMPRESSED if name.endswith(suffix)), name)

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
        return max(0, self.size - (self.raw if self._codec else self.content).tell())

    @cached_property
    def _codec(self) -> str | None:
        place = self.raw.tell()
        self.raw.seek(0)
        head = self.raw.read(4)
        self.raw.seek(place)
        by_name = next((codec for suffix, codec in COMPRESSED.items() if self.uri.lower().endswith(suffix)), None)
        return next((codec for magic, codec in MAGIC_BYTES.items() if head.startswith(magic)), by_name)

    @cached_property
    def content(self) -> io.BufferedReader:
        """The content from its beginning, decompressed where it is gzip or zstd, a buffer at a time.

        Reading it raises OSError where a compressed file is damaged or cut, and StorageError for faults of storage.
        """
        self.raw.seek(0)
        codec = self._codec
        if codec is None:
            raw = self.raw
            return raw if isinstance(raw, io.BufferedReader) else io.BufferedReader(cast(Any, raw), BUFFER)
        import pyarrow as pa

        # It raises where a stream is cut.
        stream = pa.CompressedInputStream(pa.PythonFile(self.raw, "r"), codec)
        return io.BufferedReader(cast(Any, stream), BUFFER)

    def read_all(self, limit: int) -> bytes:
        """All of a small file. Raises Malformed when it holds more than `limit` bytes or cannot be decompressed."""
        try:
            data = self.content.read(limit + 1)
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
        if isinstance(place, Mapping):
            for field in fields:
                value = place.get(field)
                if isinstance(value, str) and value:
                    return value
                if isinstance(value, list) and value and all(isinstance(part, str) for part in value):
                    return ", ".join(value)
    return ""
