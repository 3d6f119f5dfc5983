"""Interleaved pages in Parquet, as OBELICS has them: parallel lists of texts and images.

https://huggingface.co/datasets/HuggingFaceM4/OBELICS
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from calumma.model.document import Image, Text
from calumma.platform.sources.files import (
    LICENSES,
    BadInput,
    Draft,
    DraftSegment,
    File,
    Malformed,
    Reference,
    json_type,
    text_or_none,
)
from calumma.platform.sources.formats.rows import parquet_rows
from calumma.platform.sources.registry import ReaderItem, reader

NEEDED = ("texts", "images")
OPTIONAL = ("captions", *LICENSES, "url", "metadata", "general_metadata")


@reader("interleaved", (".parquet",))
def interleaved(file: File) -> Iterator[ReaderItem]:
    """Rows of `texts: list<string|null>` and `images`, a list of bytes, references or Hugging Face's {bytes, path},
    exactly one of the two set at each index; optional `captions`, `license`, `url` and OBELICS's metadata."""
    for row in parquet_rows(file, _columns):
        if isinstance(row, BadInput):
            yield row
            continue
        name, record = row
        try:
            general = _parse_json(record.get("general_metadata"))
            about = {"meta": general if isinstance(general, dict) else None} | record
            yield Draft.from_record(_page(record), name, about)
        except Malformed as error:
            yield BadInput(name, str(error))


def _columns(present: list[str]) -> Sequence[str]:
    if missing := [name for name in NEEDED if name not in present]:
        raise Malformed(f"has no column {', '.join(missing)}; it has {', '.join(present)}")
    return [name for name in (*NEEDED, *OPTIONAL) if name in present]


def _page(row: dict[str, Any]) -> list[DraftSegment]:
    texts, images = row["texts"] or [], row["images"] or []
    captions = row.get("captions") or _alternative_texts(row.get("metadata"), len(images))
    if not all(isinstance(column, list) for column in (texts, images, captions)):
        raise Malformed("texts, images and captions must be lists")
    if not len(texts) == len(images) == len(captions):
        lengths = f"{len(texts)}, {len(images)}, {len(captions)}"
        raise Malformed(f"texts, images and captions must be equally long, found {lengths}")
    parts: list[DraftSegment] = []
    for index, (text, image, caption) in enumerate(zip(texts, images, captions, strict=True)):
        if (text is None) == (image is None):
            both = "both a text and an image" if text is not None else "neither text nor image"
            raise Malformed(f"has {both} at index {index}")
        if image is not None:
            parts.append(_image(image, index, text_or_none(caption)))
        elif isinstance(text, str):
            parts.append(Text(text))
        else:
            raise Malformed(f"the text at index {index} is {json_type(text)}")
    return parts


def _image(value: Any, index: int, caption: str | None) -> DraftSegment:
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes):
        return Image(value, caption)
    if isinstance(value, str):
        return Reference(value, caption)
    raise Malformed(f"the image at index {index} is {json_type(value)}, neither bytes nor a reference")


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
