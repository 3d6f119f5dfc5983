"""Specifications from YAML files and `a.b=value` overrides. Everything is checked here, before Ray starts.

Errors name the line; a key given twice is an error, where YAML libraries let the last win.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from calumma.platform.specification import M, SpecificationError, validate

FieldPath = tuple[str | int, ...]  # keys and indices from the top of a file


def read_specification(kind: type[M], file: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> M:
    """A specification from a YAML file and `a.b=value` overrides (values are YAML). Raises SpecificationError."""
    path = Path(file)
    try:
        if not path.is_file():
            raise SpecificationError(f"there is no specification file {path}")
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise SpecificationError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise SpecificationError(
            f"{path} is not UTF-8 text (byte {error.start}: {error.reason}); is it a YAML file? Save it as UTF-8"
        ) from error
    values, lines = parse_yaml(text, str(path))
    if not isinstance(values, dict):
        raise SpecificationError(f"{path} must hold a mapping of fields, found {type(values).__name__}")
    places: dict[FieldPath, str] = {place: f"line {line}" for place, line in lines.items()}
    for override in overrides:
        changed = _apply_override(values, override)
        places = {place: line for place, line in places.items() if place[: len(changed)] != changed}
        places[changed] = f"--set {override}"
    return validate(kind, values, str(path), places)


def parse_yaml(text: str, origin: str) -> tuple[Any, dict[FieldPath, int]]:
    """The plain values of a YAML text, and the line of every field and list item in it.

    Raises SpecificationError, which names the line, for text that is no YAML, more than one document, and a key that a
    mapping holds twice.
    """
    try:
        loader = yaml.SafeLoader(text)
    except yaml.reader.ReaderError as error:
        raise SpecificationError(f"{origin} is not valid YAML: {error}") from error
    loader.name = origin  # what its messages call the text
    try:
        node = loader.get_single_node()
        lines = _field_lines(node, (), origin) if node is not None else {}
        return (None if node is None else loader.construct_document(node)), lines
    except yaml.composer.ComposerError as error:
        if error.problem == "but found another document" and error.problem_mark is not None:
            raise SpecificationError(
                f"{origin}: a second document begins in line {error.problem_mark.line + 1} (`---`); "
                "one file holds one specification"
            ) from error
        raise SpecificationError(f"{origin} is not valid YAML: {error}") from error
    except SpecificationError:
        raise
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date that is none
        raise SpecificationError(f"{origin} is not valid YAML: {error}") from error
    except RecursionError as error:
        raise SpecificationError(f"{origin} is nested too deep, or within itself") from error
    finally:
        loader.dispose()


def _field_lines(node: yaml.Node, place: FieldPath, origin: str) -> dict[FieldPath, int]:
    """Lines, counted from 1, of what stands below a node. Raises SpecificationError for a key given twice."""
    lines: dict[FieldPath, int] = {}
    if isinstance(node, yaml.MappingNode):
        first: dict[str, int] = {}
        for key, value in node.value:
            name, line = str(key.value), key.start_mark.line + 1
            if name in first:
                where = ".".join(map(str, (*place, name)))
                raise SpecificationError(
                    f"{origin}: {where} is given twice, in line {first[name]} and in line {line}; keep one"
                )
            first[name] = lines[(*place, name)] = line
            lines |= _field_lines(value, (*place, name), origin)
    elif isinstance(node, yaml.SequenceNode):
        for number, value in enumerate(node.value):
            lines[(*place, number)] = value.start_mark.line + 1
            lines |= _field_lines(value, (*place, number), origin)
    return lines


def _apply_override(values: dict[str, Any], override: str) -> FieldPath:
    """Set what an override names; the place of it."""
    path, separator, text = override.partition("=")
    if not separator or not path:
        raise SpecificationError(f"override {override!r} must look like field.subfield=value")
    *parents, last = path.split(".")
    target: Any = values
    for parent in parents:
        if target.get(parent) is None:
            target[parent] = {}
        target = target[parent]
        if not isinstance(target, dict):
            raise SpecificationError(f"override {override!r}: {parent!r} holds a value, not a section")
    target[last], _ = parse_yaml(text, f"override {override!r}: the value")
    return tuple(path.split("."))
