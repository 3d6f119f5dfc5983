"""The lines of a batch's input file: requests, and what is wrong with those that are none."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from calumma.serve.batches.records import LineError

LONGEST_ID = 512


@dataclass(frozen=True)
class Line:
    """number: from 1. custom_id: None where a line that is wrong has none. body: of the request, as JSON."""

    number: int
    custom_id: str | None
    body: bytes = b""
    error: LineError | None = None


def parse_lines(data: bytes, endpoint: str) -> Iterator[Line]:
    """Empty lines count for numbers alone."""
    seen: dict[str, int] = {}
    for number, text in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if text.strip():
            yield _parsed(number, text, endpoint, seen)


def _parsed(number: int, text: bytes, endpoint: str, seen: dict[str, int]) -> Line:
    """seen: the custom ids so far, by the line that they are in."""

    def wrong(code: str, message: str, param: str | None = None, custom_id: str | None = None) -> Line:
        return Line(
            number, custom_id, error=LineError(code=code, message=f"line {number}: {message}", line=number, param=param)
        )

    try:
        value: Any = json.loads(text)
    except (ValueError, RecursionError) as error:
        return wrong("invalid_json_line", f"it is no JSON: {str(error)[:200]}")
    if not isinstance(value, dict):
        return wrong("invalid_json_line", "it is no JSON object")
    name = value.get("custom_id")
    if not isinstance(name, str) or not 0 < len(name) <= LONGEST_ID or not _writable(name):
        return wrong("invalid_custom_id", f"custom_id must be a text of 1 to {LONGEST_ID} characters", "custom_id")
    if name in seen:
        return wrong("duplicate_custom_id", f"the custom_id {name!r} is that of line {seen[name]}", "custom_id", name)
    seen[name] = number
    if value.get("method") != "POST":
        return wrong("invalid_method", "method must be POST", "method", name)
    if value.get("url") != endpoint:
        return wrong("mismatched_url", f"url must be {endpoint}, the batch's endpoint", "url", name)
    body = value.get("body")
    if not isinstance(body, dict):
        return wrong("invalid_body", "body must be a JSON object", "body", name)
    if body.get("stream"):
        return wrong("unsupported", "a batch has no streams: leave `stream` out", "body.stream", name)
    return Line(number, name, json.dumps(body).encode())


def _writable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
