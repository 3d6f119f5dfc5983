"""Server-sent events."""

from __future__ import annotations

import json
from typing import Any

from pydantic import BaseModel

from calumma.serve.http.wire.responses import ImageEvent

END = b"data: [DONE]\n\n"


def event(chunk: BaseModel) -> bytes:
    """One server-sent event. Absent fields of deltas are left out, `finish_reason: null` stays, as OpenAI sends it."""
    values = chunk.model_dump(mode="json")
    if values.get("usage") is None:
        values.pop("usage", None)
    for choice in values.get("choices", ()):
        if "delta" in choice:
            choice["delta"] = {key: value for key, value in choice["delta"].items() if value is not None}
            for call in choice["delta"].get("tool_calls", ()):
                call["function"] = {key: value for key, value in call["function"].items() if value is not None}
                for key in [key for key, value in call.items() if value is None]:
                    del call[key]
            if drawing := choice["delta"].get("drawing"):
                choice["delta"]["drawing"] = {key: value for key, value in drawing.items() if value is not None}
        if choice.get("logprobs") is None:
            choice.pop("logprobs", None)
    return _event(values)


def image_event(chunk: ImageEvent) -> bytes:
    return typed_event(chunk.model_dump(mode="json", exclude_none=True))


def typed_event(values: dict[str, Any]) -> bytes:
    """An event that carries its type as the event's name too."""
    return f"event: {values['type']}\n".encode() + _event(values)


def error_event(body: dict[str, Any]) -> bytes:
    return _event(body)


def _event(values: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(values, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"
