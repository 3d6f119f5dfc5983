"""Interleaved pages as OBELICS and MINT-1T have them: parallel lists of texts and images.

https://huggingface.co/datasets/HuggingFaceM4/OBELICS, https://github.com/mlfoundations/MINT-1T
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from calumma.model.document import Text
from calumma.platform.sources.files import (
    ABOUT_FIELDS,
    BadInput,
    DraftSegment,
    File,
    Malformed,
    field_names,
    json_type,
    text_or_none,
)
from calumma.platform.sources.formats.images.values import OtherImages, cannot_be_had, image_segment, is_missing
from calumma.platform.sources.formats.records.containers import COLUMNAR, JSON, records
from calumma.platform.sources.formats.records.json_array import Row
from calumma.platform.sources.formats.records.rows import drafts
from calumma.platform.sources.notes import Notes
from calumma.platform.sources.registry import ReaderItem, reader

NEEDED = ("texts", "images")
OPTIONAL = ("captions", *ABOUT_FIELDS, "general_metadata")


@reader("interleaved", (*COLUMNAR, *JSON))
def interleaved(file: File, *, other_images: OtherImages = "bad") -> Iterator[ReaderItem]:
    """{"texts": [string or null, …], "images": [bytes, reference, Hugging Face's {bytes, path}, or null, …]} a record,
    exactly one of the two set at each index; optional `captions`, `license`, `url` and OBELICS's metadata.

    An image that cannot be had, or is empty on both sides as failed downloads are, makes the page bad;
    `other_images: leave_out` drops it alone.
    """
    rows = _with_general(records(file, _columns))
    known = frozenset({*NEEDED, *OPTIONAL})
    yield from drafts(rows, lambda row: page(row, file.notes, other_images == "leave_out"), file, known)


def _with_general(rows: Iterable[Row | BadInput]) -> Iterator[Row | BadInput]:
    """The records with OBELICS's `general_metadata` as `meta`, where they have none: it tells the URL."""
    for row in rows:
        if not isinstance(row, BadInput):
            name, record = row
            general = _parse_json(record.get("general_metadata"))
            if isinstance(general, dict) and not record.get("meta"):
                row = (name, {**record, "meta": general})
        yield row


def _columns(present: list[str]) -> Sequence[str]:
    _require(dict.fromkeys(present))
    return [name for name in (*NEEDED, *OPTIONAL) if name in present]


def _require(row: dict[str, Any]) -> None:
    if missing := [name for name in NEEDED if name not in row]:
        advice = "; images with captions are the format 'pairs'" if {"image", "caption"} & set(row) else ""
        raise Malformed(f"has no {', '.join(missing)}; it has {field_names(row)}{advice}")


def page(row: dict[str, Any], notes: Notes, optional: bool = False) -> list[DraftSegment]:
    """The segments of a record; images that cannot be had are left out if `optional`. Raises Malformed."""
    _require(row)
    texts, images = row["texts"] or [], row["images"] or []
    captions = row.get("captions") or _alternative_texts(row.get("metadata"), len(images))
    if not all(isinstance(column, list) for column in (texts, images, captions)):
        raise Malformed("texts, images and captions must be lists")
    if not len(texts) == len(images) == len(captions):
        lengths = f"{len(texts)}, {len(images)}, {len(captions)}"
        raise Malformed(f"texts, images and captions must be equally long, found {lengths}")
    parts: list[DraftSegment] = []
    for index, (text, image, caption) in enumerate(zip(texts, images, captions, strict=True)):
        if not (cannot_be_had(image) if optional else is_missing(image)):
            if text:  # an empty one is how some writers say none
                raise Malformed(f"has both a text and an image at index {index}")
            parts.append(image_segment(image, f"the image at index {index}", text_or_none(caption), optional=optional))
        elif isinstance(text, str):
            parts.append(Text(text))
        elif text is not None:
            raise Malformed(f"the text at index {index} is {json_type(text)}")
        elif optional:
            notes.skip("images", "that cannot be had")
        else:
            raise Malformed(
                f"has neither text nor image at index {index}; {{other_images: leave_out}} in the source's options "
                "keeps the page"
            )
    return parts


def _alternative_texts(metadata: Any, length: int) -> list[str | None]:
    """OBELICS's alternative texts, as captions."""
    entries = _parse_json(metadata)
    if not isinstance(entries, list) or len(entries) != length:
        return [None] * length
    return [text_or_none(entry.get("alt_text")) if isinstance(entry, dict) else None for entry in entries]


def _parse_json(value: Any) -> Any:
    """OBELICS keeps its metadata as JSON in a string."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        return None
