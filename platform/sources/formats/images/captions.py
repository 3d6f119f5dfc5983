"""The words of an image, by the names that people give them: fields of records, members of archives, files beside."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from calumma.platform.sources.files import Malformed, json_type
from calumma.platform.sources.formats.images.values import is_missing
from calumma.platform.sources.formats.records.containers import list_in, words_of

# Of a record, or a sample, that has several the first that holds something is read.
NAMES = (
    "txt", "caption", "captions", "text", "texts", "alt_text", "sentence", "sentences", "comment", "description", "cls",
    "label",
)  # fmt: skip
MEMBERS = tuple(name for name in NAMES if name != "label")  # a KEY.label may be an image's mask
IN_OBJECTS = ("raw", "caption", "text")  # of a list's entries: COCO's and Karpathy's sentences


def field_with_words(row: Mapping[str, Any], names: tuple[str, ...] = NAMES) -> str | None:
    """The first of these fields that holds something."""
    return next((name for name in names if not is_missing(row.get(name)) and row[name] != []), None)


def words_in(value: Any, field: str) -> list[str]:
    """The captions in a field: a text, a list of texts or of objects that hold one, or a class. Empty ones are left
    out. Raises Malformed."""
    value = list_in(value)
    texts = []
    for each in value if isinstance(value, list) else [value]:
        if isinstance(each, Mapping) and any(name in each for name in IN_OBJECTS):
            each = next((each[name] for name in IN_OBJECTS if each.get(name)), None)
        words = words_of(each)
        if each is not None and words is None and each != "" and not (isinstance(each, str) and each.isspace()):
            raise Malformed(f"`{field}` is {json_type(each)}, not a caption")
        if words:
            texts.append(words)
    return texts
