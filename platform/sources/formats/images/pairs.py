"""Images with captions, a record each: Hugging Face's image datasets, and tables that name image files.

https://huggingface.co/docs/datasets/image_dataset
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from calumma.model.document import Image, Text
from calumma.platform.sources.files import (
    ABOUT_FIELDS,
    BadInput,
    Draft,
    DraftSegment,
    File,
    Malformed,
    Reference,
    field_names,
)
from calumma.platform.sources.formats.images.captions import NAMES, field_with_words, words_in
from calumma.platform.sources.formats.images.values import OtherImages, cannot_be_had, image_segment, is_missing
from calumma.platform.sources.formats.records.containers import SUFFIXES, list_in, records
from calumma.platform.sources.notes import Notes
from calumma.platform.sources.registry import ReaderItem, reader

IMAGES = (
    "image", "images", "img", "imgs", "jpg", "jpeg", "png", "webp", "image_bytes", "image_path", "image_paths",
    "file_name", "file_names", "filename", "filepath", "file_path", "image_file", "image_name", "path",
)  # fmt: skip


@reader("pairs", SUFFIXES)
def pairs(
    file: File,
    *,
    image: str | None = None,
    caption: str | None = None,
    captions: Literal["each", "first"] = "each",
    other_images: OtherImages = "bad",
) -> Iterator[ReaderItem]:
    """{"image": bytes, path, data URL or {"bytes", "path"}, "caption": …} a record; `image` and `caption` name the
    fields if they are none of the usual. A list of images stands in its order, before the caption. Of a list of
    captions each makes a pair (or the `first` alone). `other_images: leave_out` drops an image that cannot be had.
    """
    read = PairFields(image, caption, captions == "first", other_images == "leave_out")
    for row in records(file, read.columns):
        if isinstance(row, BadInput):
            yield row
            continue
        yield from read.drafts(file, *row)


class PairFields:
    """Which fields of a record are its image and its captions; makes drafts of them."""

    def __init__(
        self, image: str | None = None, caption: str | None = None, first: bool = False, optional: bool = False
    ) -> None:
        self._images = IMAGES if image is None else (image,)
        self._captions = NAMES if caption is None else (caption,)
        self._first, self._optional = first, optional
        self._caption_named = caption is not None

    def columns(self, present: list[str]) -> Sequence[str]:
        """What to read of a columnar file. Raises Malformed where it has no image."""
        row = dict.fromkeys(present, "")
        self._field(row, self._images, "image")
        return [name for name in present if name in (*self._images, *self._captions, *ABOUT_FIELDS)]

    def drafts(self, file: File, name: str, row: Mapping[str, Any]) -> Iterator[ReaderItem]:
        """The pairs of a record; fields that are not read are counted in the file's notes."""
        read: set[str] = set(ABOUT_FIELDS)
        try:
            images = self.image_segments(row, file.notes, read)
            texts = self._texts(row, file, read)
        except Malformed as error:
            yield BadInput(name, str(error))
            return
        for field in row:
            if field not in read:
                file.notes.skip("fields", field)
        if not texts:
            file.notes.lack("caption")
        for number, text in enumerate(texts or [None]):
            place = name if len(texts) < 2 else f"{name}, caption {number}"
            yield Draft.from_record(_segments(images, text), place, row)

    def _field(self, row: Mapping[str, Any], fields: Sequence[str], what: str) -> str:
        """The first of the fields that the record has, one that holds something before one that does not."""
        present = [field for field in fields if field in row]
        found = next((field for field in present if not is_missing(row[field])), None) or next(iter(present), None)
        if found is None:
            raise Malformed(
                f"has no field {' or '.join(fields[:3])}{' …' if len(fields) > 3 else ''}; it has {field_names(row)}; "
                f"the source's options may name it: {{{what}: FIELD}}"
            )
        return found

    def image_segments(self, row: Mapping[str, Any], notes: Notes, read: set[str]) -> list[DraftSegment]:
        field = self._field(row, self._images, "image")
        read.add(field)
        value = list_in(row[field])
        values = value if isinstance(value, list) else [value]
        if not values:
            raise Malformed(f"`{field}` is empty")
        segments = []
        for index, each in enumerate(values):
            if self._optional and cannot_be_had(each):
                notes.skip("images", "that cannot be had")
                continue
            what = f"`{field}`" if len(values) == 1 else f"image {index} of `{field}`"
            segments.append(image_segment(each, what, optional=self._optional))
        return segments

    def _texts(self, row: Mapping[str, Any], file: File, read: set[str]) -> list[str]:
        if self._caption_named:
            field = self._field(row, self._captions, "caption")
        else:
            named = field_with_words(row)
            if named is None:
                return []
            field = named
        read.add(field)
        texts = words_in(row[field], field)
        if self._first and len(texts) > 1:
            file.notes.skip("captions", "beyond an image's first", len(texts) - 1)
            del texts[1:]
        return texts


def _segments(images: Sequence[DraftSegment], text: str | None) -> list[DraftSegment]:
    """One image carries its caption; several stand before their text."""
    if len(images) == 1 and text is not None and isinstance(images[0], Image | Reference):
        return [replace(images[0], caption=text)]
    return [*images, *([Text(text)] if text is not None else [])]
