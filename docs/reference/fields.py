"""Tables of pydantic models: each field with its type, default, range and meaning."""

from __future__ import annotations

import enum
import inspect
import re
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

PLAIN = {str: "text", int: "whole number", float: "number", bool: "true or false", type(None): "null", Any: "anything"}
# with spaces at which a line does not break
BOUNDS = {"ge": "≥\u00a0{}", "gt": ">\u00a0{}", "le": "≤\u00a0{}", "lt": "<\u00a0{}", "multiple_of": "a multiple of {}"}
Link = Callable[[type[BaseModel]], str]


def table(model: type[BaseModel], link: Link) -> str:
    """A Markdown table of a model's fields; `link` gives the Markdown that names another model."""
    rows = ["| field | type | default | range | meaning |", "|---|---|---|---|---|"]
    for name, field in model.model_fields.items():
        cells = (f"`{name}`", kind(field.annotation, link), default(field), bounds(field), meaning(field))
        rows.append("| " + " | ".join(map(cell, cells)) + " |")
    return "\n".join(rows)


def cell(text: str) -> str:
    """Markdown for one cell of a table."""
    return re.sub(r"[ \n]+", " ", text).replace("|", "\\|").strip()


def plain(text: str) -> str:
    """The code's words as Markdown: what stands between backticks stays, elsewhere no character is markup."""
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(
        part if part.startswith("`") else re.sub(r"([*_\[\]])", r"\\\1", part.replace("<", "&lt;")) for part in parts
    )


def purpose(model: type[BaseModel]) -> str:
    """A model's docstring, unless it has none of its own."""
    return plain(inspect.cleandoc(model.__dict__.get("__doc__") or ""))


def meaning(field: FieldInfo) -> str:
    """What the field's description says or, of a section without one, what the section is for."""
    if field.description:
        return plain(field.description)
    if get_origin(field.annotation) is Literal and len(get_args(field.annotation)) == 1:
        return "says what the file is for"
    sections = list(models_in(field.annotation))
    return purpose(sections[0]).partition("\n")[0] if len(sections) == 1 else ""


def kind(annotation: Any, link: Link) -> str:
    """A type in words: `list[int]` is a list of whole numbers."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return kind(arguments[0], link)
    if origin is Literal:
        return " or ".join(f"`{value}`" for value in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(kind(one, link) for one in arguments))
    if origin in (list, tuple):
        inner = [one for one in arguments if one is not Ellipsis]
        return f"list of {' or '.join(dict.fromkeys(_plural(kind(one, link)) for one in inner))}"
    if origin in (dict, Mapping):
        return f"mapping of names to {_plural(kind(arguments[1], link))}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return link(annotation)
    if isinstance(annotation, type) and issubclass(annotation, enum.Enum):
        return " or ".join(f"`{one.value}`" for one in annotation)
    return PLAIN.get(annotation) or f"`{getattr(annotation, '__name__', annotation)}`"


def _plural(text: str) -> str:
    return {"text": "texts", "whole number": "whole numbers", "number": "numbers"}.get(text, text)


def default(field: FieldInfo) -> str:
    if field.is_required():
        return "**required**"
    value = field.get_default(call_default_factory=True, validated_data={})
    return shown(value)


def shown(value: Any) -> str:
    """A value as YAML writes it in a line."""
    if value is None or value is PydanticUndefined:
        return "null"
    if isinstance(value, BaseModel):
        changed = {
            name: getattr(value, name)
            for name in sorted(value.model_fields_set, key=list(type(value).model_fields).index)
        }
        return (
            f"`{{{', '.join(f'{name}: {_inline(one)}' for name, one in changed.items())}}}`"
            if changed
            else "its defaults"
        )
    return f"`{_inline(value)}`"


def _inline(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if value is None:
        return "null"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_inline(one)}" for key, one in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_inline, value)) + "]"
    if isinstance(value, float):
        return f"{value:g}" if value != int(value) or abs(value) >= 1e6 else f"{value:.1f}"
    return str(value)


def bounds(field: FieldInfo) -> str:
    """What a field's value must keep to."""
    return ", ".join(dict.fromkeys(_bounds([*field.metadata], field.annotation)))


def _bounds(metadata: list[Any], annotation: Any) -> Iterator[str]:
    for one in metadata:
        for name, words in BOUNDS.items():
            if (value := getattr(one, name, None)) is not None:
                yield words.format(f"{value:g}" if isinstance(value, float) else value)
        if (least := getattr(one, "min_length", None)) is not None:
            text = str in (annotation, *get_args(annotation))
            yield f"at least {least} character{'s' * (least > 1)}" if text else f"at least {least}"
        if (pattern := getattr(one, "pattern", None)) is not None:
            yield f"`{pattern}`"
    if get_origin(annotation) is Annotated:
        yield from _bounds(list(get_args(annotation)[1:]), get_args(annotation)[0])
    elif get_origin(annotation) in (Union, types.UnionType):
        for inner in get_args(annotation):
            if get_origin(inner) is Annotated:
                yield from _bounds(list(get_args(inner)[1:]), get_args(inner)[0])


def models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """The pydantic models that a type names, at any depth of its arguments."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from models_in(inner)


def all_models(model: type[BaseModel]) -> list[type[BaseModel]]:
    """A model and every one below it, each once, in the order of fields."""
    found: list[type[BaseModel]] = []
    waiting = [model]
    while waiting:
        one = waiting.pop(0)
        if one not in found:
            found.append(one)
            waiting += [inner for field in one.model_fields.values() for inner in models_in(field.annotation)]
    return found
