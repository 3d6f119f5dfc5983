"""JSON as records have it: a key that one object gives two values is told, where Python lets the last win."""

from __future__ import annotations

import json
from typing import Any


class KeyTwice(ValueError):
    """An object gives a key two values, of which one would be lost."""


def parse(data: bytes) -> Any:
    """The value of some JSON. Raises ValueError (of which KeyTwice), RecursionError."""
    value = json.loads(data)
    # A hook for every object would take three times as long: more colons behind quotation marks than keys call for it.
    colons = data.count(b'":') + data.count(b'" :')
    if isinstance(value, dict) and colons > len(value) and colons > _count_keys(value):
        json.loads(data, object_pairs_hook=_checked)
    return value


def _count_keys(value: Any) -> int:
    count, unseen = 0, [value]
    while unseen:
        each = unseen.pop()
        if isinstance(each, dict):
            count += len(each)
            each = each.values()
        unseen += [inner for inner in each if isinstance(inner, dict | list)]
    return count


def _checked(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        for key, value in pairs:
            if found[key] != value and value == value:
                raise KeyTwice(f"has the key `{key}` twice, with different values")
    return found
