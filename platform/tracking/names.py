"""Names that MLflow takes: nested mappings as one level of them, and any other name as the nearest that is taken."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

from pydantic import BaseModel

_LENGTH = 250


def valid_names(names: Iterable[str]) -> dict[str, str]:
    """Each name -> the nearest that MLflow takes; names that become equal are told apart by a number."""
    different = list(dict.fromkeys(names))
    return dict(zip(different, _told_apart(different), strict=True))


def valid_name(key: str) -> str:
    """The name nearest to `key` that MLflow takes: few characters, and as a path equal to its normal form."""
    name = re.sub(r"[^\w\-./: ]", "_", key)[-_LENGTH:]
    parts = ["__" if part == ".." else part for part in name.split("/") if part not in ("", ".")]
    name = "/".join(parts) or "_"
    return f"__{name[2:]}" if name.startswith("..") else name


def flatten(values: dict[str, Any]) -> dict[str, Any]:
    """Nested mappings as one level of dotted names that MLflow takes; no value is lost."""
    leaves = list(_leaves(values, ""))
    return dict(zip(_told_apart([key for key, _ in leaves]), (value for _, value in leaves), strict=True))


def _told_apart(names: Iterable[str]) -> list[str]:
    taken: dict[str, None] = {}
    for name in names:
        plain = new = valid_name(name)
        number = 1
        while new in taken:
            number += 1
            new = f"{plain[: _LENGTH - len(str(number)) - 1]} {number}"
        taken[new] = None
    return list(taken)


def _leaves(values: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, BaseModel):
            value = value.model_dump(mode="json")
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
