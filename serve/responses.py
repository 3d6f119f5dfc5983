"""OpenAI's wire format as types: answers, chunks of streams, events.

Beyond OpenAI: images in answers (`message.images`, and `message.parts` for the order of text and images; in a stream,
`delta.images` and `delta.drawing`).
"""

from __future__ import annotations

import base64
import json
from typing import Any, Literal

from pydantic import BaseModel

from calumma.serve.pieces import Token
from calumma.serve.wire import ImageFormat, ImagePart, ImageURL, Part, Wire

Reason = Literal["stop", "length", "content_filter"]


class TokenDetails(Wire):
    text_tokens: int = 0
    image_tokens: int = 0


class Usage(Wire):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: TokenDetails
    completion_tokens_details: TokenDetails


class Alternative(Wire):
    token: str
    bytes: list[int]
    logprob: float


class ChatToken(Alternative):
    top_logprobs: list[Alternative]


class ChatLogprobs(Wire):
    content: list[ChatToken]
    refusal: None = None


class AssistantMessage(Wire):
    role: Literal["assistant"] = "assistant"
    content: str
    refusal: str | None = None
    images: list[ImagePart]
    parts: list[Part]


class ChatChoice(Wire):
    index: int = 0
    message: AssistantMessage
    finish_reason: Reason
    logprobs: ChatLogprobs | None = None


class ChatCompletion(Wire):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class Progress(Wire):
    """`preview`: a data URL of what is drawn so far."""

    done: int
    total: int
    preview: str | None = None


class Delta(Wire):
    role: Literal["assistant"] | None = None
    content: str | None = None
    refusal: str | None = None
    images: list[ImagePart] | None = None
    drawing: Progress | None = None


class ChunkChoice(Wire):
    index: int = 0
    delta: Delta
    finish_reason: Reason | None = None
    logprobs: ChatLogprobs | None = None


class ChatChunk(Wire):
    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: Usage | None = None


class TextLogprobs(Wire):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class TextChoice(Wire):
    index: int = 0
    text: str
    finish_reason: Reason | None = None
    logprobs: TextLogprobs | None = None


class Completion(Wire):
    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage | None = None


class EncodedImage(Wire):
    b64_json: str | None = None
    url: str | None = None


class Images(Wire):
    created: int
    data: list[EncodedImage]
    output_format: ImageFormat = "png"
    usage: Usage


class ImageUsage(Wire):
    """Usage as events of image generation name it."""

    input_tokens: int
    output_tokens: int
    total_tokens: int
    input_tokens_details: TokenDetails


class ImageEvent(Wire):
    type: Literal["image_generation.partial_image", "image_generation.completed"]
    b64_json: str
    created_at: int
    size: str
    quality: Literal["auto"] = "auto"
    background: Literal["opaque"] = "opaque"
    output_format: ImageFormat = "png"
    partial_image_index: int | None = None
    usage: ImageUsage | None = None


class ModelCard(Wire):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "calumma"


class ModelList(Wire):
    object: Literal["list"] = "list"
    data: list[ModelCard]


# ---- parts


def data_url(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()


def image_part(png: bytes) -> ImagePart:
    """A PNG as a content part with a data URL."""
    return ImagePart(image_url=ImageURL(url=data_url(png)))


def spelled(token: int, surface: bytes) -> str:
    """A token as a string: its text; part of a character as OpenAI writes it; one without a text by its number."""
    if not surface:
        return f"token_id:{token}"
    try:
        return surface.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in surface)


def chat_logprobs(tokens: list[Token]) -> ChatLogprobs:
    def alternative(token: int, surface: bytes, logprob: float) -> Alternative:
        return Alternative(token=spelled(token, surface), bytes=list(surface), logprob=logprob)

    return ChatLogprobs(
        content=[
            ChatToken(
                **alternative(token.id, token.surface, token.logprob or 0.0).model_dump(),
                top_logprobs=[alternative(*one) for one in token.top],
            )
            for token in tokens
        ]
    )


def text_logprobs(tokens: list[Token], offset: int = 0) -> TextLogprobs:
    """`offset`: characters before the text that the tokens' positions count from."""
    return TextLogprobs(
        tokens=[spelled(token.id, token.surface) for token in tokens],
        token_logprobs=[token.logprob for token in tokens],
        top_logprobs=[_named(token) for token in tokens],
        text_offset=[offset + token.begin for token in tokens],
    )


def _named(token: Token) -> dict[str, float] | None:
    """Alternatives by their strings, the token itself among them; of two with one string the likelier."""
    if token.logprob is None:
        return None
    named: dict[str, float] = {}
    for identity, surface, logprob in (*token.top, (token.id, token.surface, token.logprob)):
        name = spelled(identity, surface)
        named[name] = max(logprob, named.get(name, logprob))
    return named


# ---- server-sent events


def event(chunk: BaseModel) -> bytes:
    """One server-sent event. Absent fields of deltas are left out, `finish_reason: null` stays, as OpenAI sends it."""
    values = chunk.model_dump(mode="json")
    if values.get("usage") is None:
        values.pop("usage", None)
    for choice in values.get("choices", ()):
        if "delta" in choice:
            choice["delta"] = {key: value for key, value in choice["delta"].items() if value is not None}
            if drawing := choice["delta"].get("drawing"):
                choice["delta"]["drawing"] = {key: value for key, value in drawing.items() if value is not None}
        if choice.get("logprobs") is None:
            choice.pop("logprobs", None)
    return _event(values)


def image_event(chunk: ImageEvent) -> bytes:
    """An event of image generation, which carries its type as the event's name too."""
    return f"event: {chunk.type}\n".encode() + _event(chunk.model_dump(mode="json", exclude_none=True))


def error_event(body: dict[str, Any]) -> bytes:
    return _event(body)


END = b"data: [DONE]\n\n"


def _event(values: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(values, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"
