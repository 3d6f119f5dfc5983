"""Specifications from YAML files and `a.b=value` overrides. Everything is checked here, before Ray starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from calumma.platform.specification import S, SpecificationError, validate


def read(kind: type[S], file: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> S:
    """A specification from a YAML file and `a.b=value` overrides (values are YAML). Raises SpecificationError."""
    path = Path(file)
    try:
        if not path.is_file():
            raise SpecificationError(f"there is no specification file {path}")
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SpecificationError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise SpecificationError(
            f"{path} is not UTF-8 text (byte {error.start}: {error.reason}); is it a YAML file? Save it as UTF-8"
        ) from error
    except yaml.YAMLError as error:
        raise SpecificationError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise SpecificationError(f"{path} must hold a mapping of fields, found {type(values).__name__}")
    for override in overrides:
        _apply(values, override)
    return validate(kind, values, str(path))


def _apply(values: dict[str, Any], override: str) -> None:
    path, separator, text = override.partition("=")
    if not separator or not path:
        raise SpecificationError(f"override {override!r} must look like field.subfield=value")
    *parents, last = path.split(".")
    target = values
    for parent in parents:
        if target.get(parent) is None:
            target[parent] = {}
        target = target[parent]
        if not isinstance(target, dict):
            raise SpecificationError(f"override {override!r}: {parent!r} holds a value, not a section")
    try:
        target[last] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise SpecificationError(f"override {override!r}: the value is not valid YAML: {error}") from error
