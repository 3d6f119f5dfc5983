"""JSON as records have it: a key that one object gives two values is told, where Python lets the last win."""

from __future__ import annotations

import json
from typing import Any


class KeyTwice(ValueError):
    """An object gives a key two values, of which one would be lost."""


def parse(data: bytes) -> Any:
    """The value of some JSON. Raises ValueError (of which KeyTwice), RecursionError."""
    text = data.decode(json.detect_encoding(data), "surrogatepass")  # as json.loads does
    try:
        return DECODER.decode(text)
    except KeyTwice:
        json.loads(text)  # what is broken further on is told as broken
        raise


def _checked(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        for key, value in pairs:
            if found[key] != value and value == value:
                raise KeyTwice(f"has the key `{key}` twice, with different values")
    return found


DECODER = json.JSONDecoder(object_pairs_hook=_checked)
