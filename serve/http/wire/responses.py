"""OpenAI's wire format as types: answers, chunks of streams, events.

Beyond OpenAI: images in answers (`message.images`, and `message.parts` for the order of text and images; in a stream,
`delta.images` and `delta.drawing`).
"""

from __future__ import annotations

from typing import Literal

from calumma.serve.http.wire.content import ImagePart, Part, Wire
from calumma.serve.http.wire.requests import ImageFormat

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
