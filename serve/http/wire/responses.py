"""OpenAI's wire format as types: answers, chunks of streams, events.

Beyond OpenAI: images in answers (`message.images`, and `message.parts` for the order of text and images; in a stream,
`delta.images` and `delta.drawing`).
"""

from __future__ import annotations

from typing import Literal

from calumma.serve.http.wire.content import ContentPart, ImagePart, WireModel
from calumma.serve.http.wire.requests import ImageFormat
from calumma.serve.http.wire.tools import ToolCall, ToolCallChunk

FinishReason = Literal["stop", "length", "content_filter", "tool_calls"]


class TokenDetails(WireModel):
    text_tokens: int = 0
    image_tokens: int = 0


class Usage(WireModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: TokenDetails
    completion_tokens_details: TokenDetails


class Alternative(WireModel):
    token: str
    bytes: list[int]
    logprob: float


class ChatToken(Alternative):
    top_logprobs: list[Alternative]


class ChatLogprobs(WireModel):
    content: list[ChatToken]
    refusal: None = None


class AssistantMessage(WireModel):
    """content: None where there are calls alone."""

    role: Literal["assistant"] = "assistant"
    content: str | None
    refusal: str | None = None
    images: list[ImagePart]
    parts: list[ContentPart]
    tool_calls: list[ToolCall] | None = None


class ChatChoice(WireModel):
    index: int = 0
    message: AssistantMessage
    finish_reason: FinishReason
    logprobs: ChatLogprobs | None = None


class ChatCompletion(WireModel):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class Progress(WireModel):
    """`preview`: a data URL of what is drawn so far."""

    done: int
    total: int
    preview: str | None = None


class IndexedImage(ImagePart):
    """index: its number among the answer's images; OpenAI's client puts streams together by it."""

    index: int


class Delta(WireModel):
    role: Literal["assistant"] | None = None
    content: str | None = None
    refusal: str | None = None
    images: list[IndexedImage] | None = None
    tool_calls: list[ToolCallChunk] | None = None
    drawing: Progress | None = None


class ChunkChoice(WireModel):
    index: int = 0
    delta: Delta
    finish_reason: FinishReason | None = None
    logprobs: ChatLogprobs | None = None


class ChatChunk(WireModel):
    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: Usage | None = None


class TextLogprobs(WireModel):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class TextChoice(WireModel):
    index: int = 0
    text: str
    finish_reason: FinishReason | None = None
    logprobs: TextLogprobs | None = None


class Completion(WireModel):
    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage | None = None


class EncodedImage(WireModel):
    b64_json: str | None = None
    url: str | None = None


class Images(WireModel):
    created: int
    data: list[EncodedImage]
    output_format: ImageFormat = "png"
    usage: Usage


class ImageUsage(WireModel):
    """Usage as events of image generation name it."""

    input_tokens: int
    output_tokens: int
    total_tokens: int
    input_tokens_details: TokenDetails


EventKind = Literal["image_generation", "image_edit"]


class ImageEvent(WireModel):
    type: Literal[
        "image_generation.partial_image",
        "image_generation.completed",
        "image_edit.partial_image",
        "image_edit.completed",
    ]
    b64_json: str
    created_at: int
    size: str
    quality: Literal["auto"] = "auto"
    background: Literal["opaque"] = "opaque"
    output_format: ImageFormat = "png"
    partial_image_index: int | None = None
    usage: ImageUsage | None = None


class ModelCard(WireModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "calumma"


class ModelList(WireModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]
