"""What the benchmarks' files have in common: one JSON object that holds everything, and images in a folder near it."""

from __future__ import annotations

import posixpath
from collections.abc import Sequence
from typing import Any

from calumma.platform import storage
from calumma.platform.sources.files import File, Malformed, field_names, json_type
from calumma.platform.sources.formats.records.json_values import parse

LARGEST = 4 << 30  # bytes of a file of annotations; VQAv2's are 370 MB
PROBES = 8  # images looked for in each folder


def parse_object(data: bytes, needed: Sequence[str]) -> dict[str, Any]:
    """The object that some JSON is, with lists under the names needed. Raises Malformed."""
    try:
        content = parse(data)
    except (ValueError, RecursionError) as error:
        raise Malformed(f"is no JSON: {error}") from error
    if not isinstance(content, dict):
        raise Malformed(f"holds {json_type(content)}, not an object")
    if missing := [name for name in needed if not isinstance(content.get(name), list)]:
        raise Malformed(f"has no list {', '.join(f'`{name}`' for name in missing)}; it has {field_names(content)}")
    return content


def objects(content: dict[str, Any], field: str) -> list[dict[str, Any]]:
    """A list of objects in it. Raises Malformed."""
    entries = content.get(field)
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise Malformed(f"`{field}` is no list of objects")
    return entries


def identity(value: Any) -> int | str | None:
    """What an entry is known by; None for what is none."""
    return value if isinstance(value, int | str) else None


def images_below(file: File, names: Sequence[str], folders: Sequence[str]) -> str | None:
    """The first of these folders below the source's images in which one of the first images lies; None for none."""
    for folder in folders:
        for name in names[:PROBES]:
            path = posixpath.normpath(posixpath.join(folder, name))
            if not path.startswith(("..", "/")) and storage.exists(storage.join(file.images, path)):
                return folder
    return None
