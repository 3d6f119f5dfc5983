"""OpenAI's wire format as types: what requests may hold, what answers, stream chunks and errors look like.

Beyond OpenAI: images in answers (`message.images`, and `message.parts` for the order of text and images; in a stream,
`delta.images`), and sampling fields for images. Reference: platform.openai.com/docs/api-reference/chat.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

Modality = Literal["text", "image"]


class WireError(Exception):
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
        self.body = {"error": {"message": message, "type": self.kind, "param": param, "code": code}}


class _Wire(BaseModel):
    model_config = ConfigDict(extra="ignore")


# ---- requests


class ImageURL(_Wire):
    url: str


def _as_image_url(value: Any) -> Any:
    return {"url": value} if isinstance(value, str) else value


def _as_parts(value: Any) -> Any:
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


class TextPart(_Wire):
    type: Literal["text"] = "text"
    text: str


class ImagePart(_Wire):
    type: Literal["image_url"] = "image_url"
    image_url: Annotated[ImageURL, BeforeValidator(_as_image_url)]


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]
PART_TYPES = ("text", "image_url")


class Message(_Wire):
    """`parts`, as this server's own answers carry them, stands for `content` when both are given."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[list[Part] | None, BeforeValidator(_as_parts)] = None
    parts: list[Part] | None = None

    @property
    def field(self) -> Literal["parts", "content"]:
        return "parts" if self.parts else "content"

    @property
    def body(self) -> list[TextPart | ImagePart]:
        return self.parts or self.content or []


# Fields of OpenAI's that would change the answer and that this server does not have: field -> values without effect.
WITHOUT_SUPPORT: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "stop": ([],),
    "tools": ([],),
    "functions": ([],),
    "logit_bias": ({},),
    "logprobs": (False, 0),
    "top_logprobs": (0,),
    "echo": (False,),
    "suffix": ("",),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "response_format": ({"type": "text"},),
    "audio": (),
}


class StreamOptions(_Wire):
    """`include_progress` adds chunks that say how far an image under way is."""

    include_usage: bool = False
    include_progress: bool = False


class Sampling(_Wire):
    """Sampling fields that all endpoints take. What is left out comes from the server's settings."""

    model: str | None = None
    seed: int | None = Field(None, ge=0, lt=2**63)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0, le=10)
    image_temperature: float | None = Field(None, ge=0, le=2)
    image_top_p: float | None = Field(None, gt=0, le=1)
    guidance_text: float | None = Field(None, ge=0, le=100)
    guidance_image: float | None = Field(None, ge=0, le=100)
    max_images: int | None = Field(None, ge=1, le=64)

    @model_validator(mode="before")
    @classmethod
    def _supported(cls, values: Any) -> Any:
        if isinstance(values, dict):
            for field, harmless in WITHOUT_SUPPORT.items():
                given = values.get(field)
                if field in cls.model_fields or given is None or given in harmless:
                    continue
                raise WireError(f"this server has no `{field}`; leave it out", param=field, code="unsupported")
        return values


class _Streamed(Sampling):
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=1)

    @property
    def options(self) -> StreamOptions:
        return self.stream_options or StreamOptions()


class ChatRequest(_Streamed):
    messages: list[Message] = Field(min_length=1)
    modalities: list[Modality] = Field(["text", "image"], min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)

    @property
    def limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens


class CompletionRequest(_Streamed):
    prompt: str


class ImageRequest(Sampling):
    prompt: str = Field(min_length=1)
    n: int = Field(1, ge=1, le=10)
    size: Literal["auto"] | None = None
    response_format: Literal["b64_json"] = "b64_json"


# ---- answers


class TokenDetails(_Wire):
    text_tokens: int = 0
    image_tokens: int = 0


class Usage(_Wire):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: TokenDetails
    completion_tokens_details: TokenDetails


class AssistantMessage(_Wire):
    role: Literal["assistant"] = "assistant"
    content: str
    images: list[ImagePart]
    parts: list[Part]


class ChatChoice(_Wire):
    index: int = 0
    message: AssistantMessage
    finish_reason: Literal["stop", "length"]
    logprobs: None = None


class ChatCompletion(_Wire):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class Progress(_Wire):
    done: int
    total: int


class Delta(_Wire):
    role: Literal["assistant"] | None = None
    content: str | None = None
    images: list[ImagePart] | None = None
    drawing: Progress | None = None


class ChunkChoice(_Wire):
    index: int = 0
    delta: Delta
    finish_reason: Literal["stop", "length"] | None = None


class ChatChunk(_Wire):
    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: Usage | None = None


class TextChoice(_Wire):
    index: int = 0
    text: str
    finish_reason: Literal["stop", "length"] | None = None
    logprobs: None = None


class Completion(_Wire):
    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage | None = None


class EncodedImage(_Wire):
    b64_json: str


class Images(_Wire):
    created: int
    data: list[EncodedImage]
    usage: Usage


class ModelCard(_Wire):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "calumma"


class ModelList(_Wire):
    object: Literal["list"] = "list"
    data: list[ModelCard]


def image_part(png: bytes) -> ImagePart:
    """A PNG as a content part with a data URL."""
    return ImagePart(image_url=ImageURL(url="data:image/png;base64," + base64.b64encode(png).decode()))


def event(chunk: BaseModel) -> bytes:
    """One server-sent event. Absent delta fields are left out, `finish_reason: null` stays, as OpenAI sends it."""
    values = chunk.model_dump(mode="json")
    if values.get("usage") is None:
        values.pop("usage", None)
    for choice in values["choices"]:
        if "delta" in choice:
            choice["delta"] = {key: value for key, value in choice["delta"].items() if value is not None}
    return _event(values)


def error_event(body: dict[str, Any]) -> bytes:
    return _event(body)


END = b"data: [DONE]\n\n"


def _event(values: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(values, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


def describe_errors(errors: Sequence[Any]) -> tuple[str, str | None]:
    """pydantic's errors as one sentence a client can act on, and the first field's name."""
    lines, first = [], None
    for error in errors:
        param = _param(error["loc"])
        first = first or param
        given = error.get("input")
        shown = f" (given {given!r})" if isinstance(given, str | int | float) and len(repr(given)) <= 80 else ""
        message = "is required" if error["type"] == "missing" else f"{error['msg']}{shown}"
        lines.append(f"{param}: {message}" if param else message)
    return "; ".join(lines), first


def _param(location: Sequence[str | int]) -> str | None:
    """("body", "messages", 0, "content", 1, "image_url", "image_url", "url") -> messages[0].content[1].image_url.url"""
    parts = list(location[1:] if location and location[0] == "body" else location)
    text = ""
    for before, part in zip([None, *parts], parts, strict=False):
        if isinstance(part, int):
            text += f"[{part}]"
        elif not (isinstance(before, int) and part in PART_TYPES):  # the tag that chose among content parts
            text += f".{part}" if text else str(part)
    return text or None
