"""A sample: files of one key, such as 0.jpg, 0.txt and 0.json; its image, or images, and the words for them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from calumma.model.document import Image, Text
from calumma.model.images import kind_of, suffixes
from calumma.platform.sources.encodings import decode_text
from calumma.platform.sources.files import (
    ABOUT_FIELDS,
    BadInput,
    Draft,
    DraftSegment,
    File,
    Malformed,
    json_type,
)
from calumma.platform.sources.formats.images.captions import MEMBERS, NAMES, field_with_words, words_in
from calumma.platform.sources.formats.images.interleaved import page
from calumma.platform.sources.formats.records.json_values import parse
from calumma.platform.sources.frames import frames
from calumma.platform.sources.registry import ReaderItem

KNOWN_FIELDS = frozenset({*ABOUT_FIELDS, "status", "error_message"})


def sample_draft(
    file: File,
    key: str,
    parts: Mapping[str, bytes],
    *,
    caption: str | None = None,
    encoding: str = "utf-8",
    several: bool = False,
) -> ReaderItem:
    """The document of a sample: one image with its caption, several images in their order (`several`) with the words
    behind them, or what its JSON lays out as `texts` and `images`. `parts`: extension -> content. What of it is not
    read is counted in the file's notes."""
    try:
        return _Sample(file, key, parts, caption, encoding).draft(several)
    except Malformed as error:
        return BadInput(file.at(key), str(error))


class _Sample:
    def __init__(self, file: File, key: str, parts: Mapping[str, bytes], caption: str | None, encoding: str) -> None:
        self._file, self._key, self._parts = file, key, parts
        self._caption, self._encoding = caption.removeprefix(".") if caption else None, encoding
        self._images = [e for e in parts if f".{e.rpartition('.')[2]}" in suffixes()]
        self._used = {*self._images, "json"}
        self._used_fields: set[str] = set()
        self._read: set[str] = set()  # the words of members
        self._about = self._json()

    def draft(self, several: bool) -> ReaderItem:
        status = self._about.get("status")
        if isinstance(status, str) and status != "success":
            raise Malformed(f"its status is {status!r}: {self._about.get('error_message') or 'no reason given'}")
        if not self._images:
            raise Malformed(f"has no image among {', '.join(map(self._described, sorted(self._parts)))}")
        if isinstance(self._about.get("texts"), list) and isinstance(self._about.get("images"), list):
            segments = self._interleaved(self._about["images"])
        elif len(self._images) == 1:
            words = self._words()
            segments = [Image(self._parts[self._images[0]], words)]
            if words is None:
                self._file.notes.lack("caption")
        elif several:
            segments = self._together()
        else:
            raise Malformed(
                f"has {len(self._images)} images ({', '.join(self._images)}) among {', '.join(sorted(self._parts))}; a "
                "sample is one image and its caption, unless the source's options say {images: several}"
            )
        self._count()
        place = f"{self._key}.{self._images[0]}" if len(self._images) == 1 else self._key
        return Draft.from_record(segments, self._file.at(place), self._about)

    def _described(self, extension: str) -> str:
        """An extension, with what its member is where that is a picture after all, or a drawing."""
        kind = kind_of(self._parts[extension])
        return f"{extension} ({kind})" if kind.endswith(("picture", "drawing", "document")) else extension

    def _json(self) -> dict[str, Any]:
        if "json" not in self._parts:
            return {}
        try:
            about = parse(self._parts["json"])
        except (ValueError, RecursionError) as error:
            raise Malformed(f"caption or metadata cannot be read: {error}") from error
        if not isinstance(about, dict):
            raise Malformed(f"its .json holds {json_type(about)}, not an object")
        return about

    # -- words ---------------------------------------------------------------------------------------------------------

    def _words(self, image: str = "") -> str | None:
        """The caption, from the first member or field that has one. `image`: the extension of the image it is for."""
        inside = f"{image.rpartition('.')[0]}." if image else ""
        names = (self._caption,) if self._caption else MEMBERS
        beside = tuple(f"{e}.{name}" for e in self._images[:1] for name in names) if len(self._images) == 1 else ()
        for name in (*names, *beside):  # 0.txt, or 0.jpg.txt
            if f"{inside}{name}" in self._parts and (words := self._text(f"{inside}{name}")):
                return words
        if inside:
            return None
        field = self._caption or field_with_words(self._about)
        return self._field(field) if field else None

    def _text(self, extension: str) -> str | None:
        self._used.add(extension)
        data = self._parts[extension]
        try:
            words = decode_text(data, default=self._encoding).strip()
        except Malformed as error:
            raise Malformed(f"its caption {self._key}.{extension} {error}") from error
        self._read.add(words)
        return words or None

    def _field(self, field: str) -> str | None:
        try:
            texts = words_in(self._about.get(field), field)
        except Malformed:  # boxes, masks, … beside an image: no caption, and counted as a field that is not read
            return None
        if not texts:
            return None
        self._used_fields.add(field)
        if len(texts) > 1:
            self._file.notes.skip("captions", "beyond the first", len(texts) - 1)
        return texts[0]

    # -- several images ------------------------------------------------------------------------------------------------

    def _together(self) -> list[DraftSegment]:
        segments: list[DraftSegment] = [
            Image(self._parts[e], self._words(e) if "." in e else None) for e in sorted(self._images, key=_natural)
        ]
        words = self._words()
        if words:
            segments.append(Text(words))
        elif not any(isinstance(segment, Image) and segment.caption for segment in segments):
            self._file.notes.lack("caption")
        return segments

    def _interleaved(self, images: list[Any]) -> list[DraftSegment]:
        """MINT-1T's: the images are the frames of one TIFF, or members, in the order of `images`.
        https://github.com/mlfoundations/MINT-1T"""
        self._used_fields |= {"texts", "images"}
        found = [self._parts[e] for e in sorted(self._images, key=_natural)]
        if len(found) == 1:
            found = frames(found[0])
        wanted = sum(image is not None for image in images)
        if wanted != len(found):
            raise Malformed(f"its .json places {wanted} images, and it has {len(found)}")
        pictures = iter(found)
        placed = [None if image is None else next(pictures) for image in images]
        return page({"texts": self._about["texts"], "images": placed}, self._file.notes)

    def _count(self) -> None:
        for extension in self._parts:
            if extension not in self._used:
                self._file.notes.skip("members", f".{extension}")
        for field, value in self._about.items():
            if isinstance(value, str) and field in NAMES and value.strip() in self._read:
                continue  # the same words as a member's, as img2dataset writes them
            if value is not None and field not in KNOWN_FIELDS and field not in self._used_fields:
                self._file.notes.skip("fields", field)


def _natural(name: str) -> tuple[list[str | tuple[int, str]], str]:
    """The order in which a person numbers files: 2.png before 10.png."""
    parts: list[str | tuple[int, str]] = list(re.split("([0-9]+)", name))
    digits = [part.lstrip("0") for part in parts[1::2] if isinstance(part, str)]
    parts[1::2] = [(len(number), number) for number in digits]
    return parts, name
