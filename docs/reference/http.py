"""The page of the HTTP API, from the application's OpenAPI document."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

from docs import house
from docs.reference.fields import cell, plain

HEAD = """# HTTP API

What `calumma serve start` answers; OpenAI's Python client works unchanged (`base_url="http://127.0.0.1:8000/v1"`). With
API keys, every request but those for `/`, `/health`, `/ready` and `/metrics` needs `Authorization: Bearer KEY`. Errors
are OpenAI's error objects, `{"error": {"message", "type", "param", "code"}}`. What a request leaves open comes from the
server's [sampling defaults](serve.md#samplingdefaults). A running server has the same as OpenAPI document at
`/openapi.json`.
"""
STREAMS = """## Streams

With `stream: true` an answer comes as server-sent events, `data: JSON` each. Of a chat they are [ChatChunk](#chatchunk)
with, in `delta`, the next text, image, or progress of an image; the order of chunks is the order of text and images. Of
completions they are as of a whole answer, with the next text. Of images they are [ImageEvent](#imageevent), named by
their type. A failure within a stream is an event that holds an error object. `data: [DONE]` ends each."""
BOUNDS = {
    "minimum": "≥\u00a0{}",
    "exclusiveMinimum": ">\u00a0{}",
    "maximum": "≤\u00a0{}",
    "exclusiveMaximum": "<\u00a0{}",
    "minLength": "at least {} character",
    "minItems": "at least {}",
    "pattern": "`{}`",
}


def page() -> str:
    document = house.application().openapi()
    schemas = dict(document["components"]["schemas"])
    for model in house.STREAMED:
        schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
        schemas |= {**schema.pop("$defs", {}), model.__name__: schema}
    parts = [HEAD.strip()]
    used: list[str] = []
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            parts.append(_operation(path, method, operation, used))
    parts += [STREAMS, "## Types"]
    used += [model.__name__ for model in house.STREAMED]
    done: set[str] = set()
    while todo := [name for name in used if name not in done]:
        for name in todo:
            done.add(name)
            parts.append(_type(name, schemas[name], used))
    return "\n\n".join(parts) + "\n"


def _operation(path: str, method: str, operation: dict[str, Any], used: list[str]) -> str:
    parts = [f"## {method.upper()} {path}"]
    if told := operation.get("description"):
        parts.append(plain(told))
    if parameters := operation.get("parameters"):
        rows = [f"| `{one['name']}` | {one['in']} | {_kind(one['schema'], used)} |" for one in parameters]
        parts.append("\n".join(("| parameter | in | type |", "|---|---|---|", *rows)))
    for content in _json(operation.get("requestBody", {})):
        parts.append(f"Request: {_kind(content, used)}.")
    for content in _json(operation["responses"].get("200", {})):
        if content and _kind(content, []) not in ("anything", "object"):
            parts.append(f"Response: {_kind(content, used)}.")
    return "\n\n".join(parts)


def _json(body: dict[str, Any]) -> Iterator[dict[str, Any]]:
    if found := body.get("content", {}).get("application/json"):
        yield found["schema"]


def _type(name: str, schema: dict[str, Any], used: list[str]) -> str:
    parts = [f"### {name}"]
    if told := schema.get("description"):
        parts.append(plain(told))
    needed = schema.get("required", [])
    rows = ["| field | type | default | range | meaning |", "|---|---|---|---|---|"]
    for field, about in schema.get("properties", {}).items():
        default = "**required**" if field in needed else _shown(about.get("default"))
        cells = (
            f"`{field}`",
            _kind(about, used),
            default,
            ", ".join(_bounds(about)),
            plain(about.get("description", "")),
        )
        rows.append("| " + " | ".join(map(cell, cells)) + " |")
    return "\n\n".join([*parts, "\n".join(rows)])


def _shown(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f"`{value}`"


def _kind(schema: dict[str, Any], used: list[str]) -> str:
    """A JSON schema's type in words; the named types that it meets are added to `used`."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        if name not in used:
            used.append(name)
        return f"[{name}](#{re.sub(r'[^a-z0-9_]+', '-', name.lower())})"
    for several in ("anyOf", "oneOf", "allOf"):
        if several in schema:
            return " or ".join(dict.fromkeys(_kind(one, used) for one in schema[several]))
    if "const" in schema:
        return f"`{schema['const']}`"
    if "enum" in schema:
        return " or ".join(f"`{value}`" for value in schema["enum"])
    match schema.get("type"):
        case "array":
            return f"list of {_kind(schema.get('items', {}), used)}"
        case "object":
            return "object"
        case None:
            return "anything"
        case kind:
            return {"string": "text", "integer": "whole number", "boolean": "true or false"}.get(kind, kind)


def _bounds(schema: dict[str, Any]) -> Iterator[str]:
    for one in (schema, *schema.get("anyOf", ())):
        for name, words in BOUNDS.items():
            if name in one and one.get("type") != "array":
                yield words.format(_number(one[name]))


def _number(value: Any) -> str:
    if isinstance(value, str):
        return value
    exponent = math.log2(value) if value > 2**53 else 0.5
    return f"2^{exponent:g}" if exponent.is_integer() else f"{value:g}"
