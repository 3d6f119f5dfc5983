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
    File,
    Malformed,
    Part,
    Reference,
    kind,
    text_or_none,
)
from calumma.platform.sources.formats.rows import parquet_rows
from calumma.platform.sources.registry import Found, reader

NEEDED = ("texts", "images")
OPTIONAL = ("captions", *LICENSES, "url", "metadata", "general_metadata")


@reader("interleaved", (".parquet",))
def interleaved(file: File) -> Iterator[Found]:
    """Rows of `texts: list<string|null>` and `images`, a list of bytes, references or Hugging Face's {bytes, path},
    exactly one of the two set at each index; optional `captions`, `license`, `url` and OBELICS's metadata."""
    for row in parquet_rows(file, _columns):
        if isinstance(row, BadInput):
            yield row
            continue
        name, record = row
        try:
            general = _decoded(record.get("general_metadata"))
            about = {"meta": general if isinstance(general, dict) else None} | record
            yield Draft.of(_page(record), name, about)
        except Malformed as error:
            yield BadInput(name, str(error))


def _columns(there: list[str]) -> Sequence[str]:
    if missing := [name for name in NEEDED if name not in there]:
        raise Malformed(f"has no column {', '.join(missing)}; it has {', '.join(there)}")
    return [name for name in (*NEEDED, *OPTIONAL) if name in there]


def _page(row: dict[str, Any]) -> list[Part]:
    texts, images = row["texts"] or [], row["images"] or []
    captions = row.get("captions") or _alternatives(row.get("metadata"), len(images))
    if not all(isinstance(column, list) for column in (texts, images, captions)):
        raise Malformed("texts, images and captions must be lists")
    if not len(texts) == len(images) == len(captions):
        lengths = f"{len(texts)}, {len(images)}, {len(captions)}"
        raise Malformed(f"texts, images and captions must be equally long, found {lengths}")
    parts: list[Part] = []
    for index, (text, image, caption) in enumerate(zip(texts, images, captions, strict=True)):
        if (text is None) == (image is None):
            both = "both a text and an image" if text is not None else "neither text nor image"
            raise Malformed(f"has {both} at index {index}")
        if image is not None:
            parts.append(_image(image, index, text_or_none(caption)))
        elif isinstance(text, str):
            parts.append(Text(text))
        else:
            raise Malformed(f"the text at index {index} is {kind(text)}")
    return parts


def _image(value: Any, index: int, caption: str | None) -> Part:
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes):
        return Image(value, caption)
    if isinstance(value, str):
        return Reference(value, caption)
    raise Malformed(f"the image at index {index} is {kind(value)}, neither bytes nor a reference")


def _alternatives(metadata: Any, length: int) -> list[str | None]:
    """OBELICS's alternative texts, as captions."""
    there = _decoded(metadata)
    if not isinstance(there, list) or len(there) != length:
        return [None] * length
    return [text_or_none(entry.get("alt_text")) if isinstance(entry, dict) else None for entry in there]


def _decoded(value: Any) -> Any:
    """OBELICS keeps its metadata as JSON in a string."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        return None
