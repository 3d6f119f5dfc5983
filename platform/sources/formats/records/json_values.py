"""JSON as records have it: a key that one object gives two values is told, where Python lets the last win."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any


class KeyTwice(ValueError):
    """An object gives a key two values, of which one would be lost."""


def parse(data: bytes) -> Any:
    """The value of some JSON. Raises ValueError (of which KeyTwice), RecursionError."""
    # json.loads looks for the encoding and for white space around the value, in Python: a quarter of a record's time.
    if data[:1] == b"{" and data[1:2] != b"\0":
        text = data.decode("utf-8", "surrogatepass")
        try:
            value, end = SCAN(text, 0)
        except (StopIteration, ValueError):
            return _parse(text)
        if len(text) - end <= 2 and not text[end:].strip(SPACE):
            return value
        return _parse(text)
    return _parse(data.decode(json.detect_encoding(data), "surrogatepass"))


def _parse(text: str) -> Any:
    """As `parse`, with json.loads's words for what is wrong."""
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
SCAN: Callable[[str, int], tuple[Any, int]] = DECODER.scan_once  # type: ignore[attr-defined]
SPACE = " \t\n\r"
