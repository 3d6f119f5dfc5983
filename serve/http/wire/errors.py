"""OpenAI's error object, and how errors of validation are told."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from calumma.serve.http.wire.content import WireModel


class ErrorDetail(WireModel):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(WireModel):
    """The body of every answer with an error status."""

    error: ErrorDetail


LONGEST_MESSAGE, LONGEST_PARAM = 4000, 400  # characters: both may hold what the client sent


def _sendable(text: str, longest: int = LONGEST_MESSAGE) -> str:
    """Without halves of surrogate pairs, which JSON may carry and UTF-8 cannot."""
    shown = text if len(text) <= longest else text[: longest - 1] + "…"
    return shown.encode(errors="backslashreplace").decode()


class APIError(Exception):
    """An answer with an HTTP error status and OpenAI's error object."""

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        param: str | None = None,
        code: str | None = None,
        kind: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.kind = kind or ("invalid_request_error" if status < 500 else "server_error")
        named = None if param is None else _sendable(param, LONGEST_PARAM)
        self.body = {"error": {"message": _sendable(message), "type": self.kind, "param": named, "code": code}}


def describe_errors(errors: Sequence[Any], body: Any) -> tuple[str, str | None]:
    """pydantic's errors about a body as one sentence a client can act on, and the first field's name."""
    lines: dict[str, None] = {}  # those of a union's members may be equal
    first = None
    for error in errors:
        missing = error["type"] == "missing"
        param = _param(error["loc"], body, missing)
        first = first or param
        given = error.get("input")
        shown = f" (given {given!r})" if isinstance(given, str | int | float) and len(repr(given)) <= 80 else ""
        message = "is required" if missing else f"{error['msg']}{shown}"
        lines[f"{param}: {message}" if param else message] = None
    return "; ".join(lines), first


def _param(location: Sequence[str | int], body: Any, missing: bool) -> str | None:
    """("messages", 0, "content", 1, "image_url", "image_url", "url") -> messages[0].content[1].image_url.url

    What is not in the body is none of its fields, but pydantic's name for a member of a union."""
    text, here = "", body
    for number, part in enumerate(location):
        if isinstance(part, int):
            if isinstance(here, list) and part < len(here):
                text, here = f"{text}[{part}]", here[part]
        elif (there := isinstance(here, dict) and part in here) or (missing and number == len(location) - 1):
            text, here = f"{text}.{part}" if text else part, here[part] if there else None
    return text or None
