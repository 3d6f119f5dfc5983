"""OpenAI's wire format as types: what requests may hold.

Beyond OpenAI: images in answers, sampling fields for images, top_k, min_p, progress and previews in streams.
Reference: platform.openai.com/docs/api-reference/chat.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, ConfigDict, Field, model_validator

from calumma.serve.http.wire.constraints import ConstraintFields
from calumma.serve.http.wire.content import ImagePart, MessagePart, RefusalPart, RequestModel, TextPart
from calumma.serve.http.wire.errors import APIError
from calumma.serve.http.wire.support import require_supported, warning_headers

Modality = Literal["text", "image"]


def _as_parts(value: Any) -> Any:
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


class Message(RequestModel):
    """`parts`, as this server's own answers carry them, stands for `content` when both are given. Clients that keep
    `content` and `images` of an answer, and lose their order, send back the text before the images."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[list[MessagePart] | None, BeforeValidator(_as_parts)] = None
    parts: list[MessagePart] | None = None

    @model_validator(mode="before")
    @classmethod
    def _with_images(cls, values: Any) -> Any:
        if isinstance(values, dict) and not values.get("parts") and isinstance(images := values.get("images"), list):
            content = _as_parts(values.get("content") or [])
            if images and isinstance(content, list):
                return values | {"parts": [*content, *images]}
        return values

    @property
    def field(self) -> Literal["parts", "content"]:
        return "parts" if self.parts else "content"

    @property
    def body(self) -> list[TextPart | ImagePart]:
        """A refusal is the text that it was told in."""
        parts = self.parts or self.content or []
        return [TextPart(text=part.refusal) if isinstance(part, RefusalPart) else part for part in parts]


class StreamOptions(RequestModel):
    """`include_progress` adds chunks that say how far an image under way is; `partial_images` of them a picture."""

    include_usage: bool = False
    include_progress: bool = False
    partial_images: int = Field(0, ge=0, le=8)


def _unlimited(value: Any) -> Any:
    """vLLM's -1 for no limit."""
    return 0 if value == -1 else value


TopK = Annotated[int, BeforeValidator(_unlimited), Field(ge=0)]


# Signed or not: -2 and 2**64 - 2 are one. -1 is a random one, as in vLLM and llama.cpp.
Seed = Annotated[int, Field(ge=-(2**63), lt=2**64)]


class SamplingFields(RequestModel):
    """Sampling fields that all endpoints take. What is left out comes from the server's settings."""

    model_config = ConfigDict(extra="allow")  # for the warning

    model: str | None = None
    seed: Seed | None = None
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: TopK | None = None
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0, le=10)
    image_temperature: float | None = Field(None, ge=0, le=2)
    image_top_p: float | None = Field(None, gt=0, le=1)
    image_top_k: TopK | None = None
    image_min_p: float | None = Field(None, ge=0, le=1)
    guidance_text: float | None = Field(None, ge=0, le=100)
    guidance_image: float | None = Field(None, ge=0, le=100)
    max_images: int | None = Field(None, ge=1, le=64)

    @model_validator(mode="before")
    @classmethod
    def _supported(cls, values: Any) -> Any:
        if isinstance(values, dict):
            require_supported(values, cls.model_fields)
        return values

    @property
    def headers(self) -> dict[str, str]:
        """Of the answer: a warning where the request has fields that nobody knows."""
        return warning_headers(self.model_extra or ())


def _as_list(value: Any) -> Any:
    """One string, or several; an empty one is none, as several clients send it."""
    return ([value] if value else None) if isinstance(value, str) else value


TokenId = Annotated[int, Field(ge=0, lt=2**31)]


class TextFields(ConstraintFields, SamplingFields):
    """What the endpoints have in common that answer with text. Token ids and the fields with vLLM's names mean what
    they do there."""

    stream: bool = False
    stream_options: StreamOptions | None = None
    n: int = Field(1, ge=1)
    best_of: int | None = Field(None, ge=1)
    stop: Annotated[list[Annotated[str, Field(min_length=1)]] | None, BeforeValidator(_as_list)] = None
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    logit_bias: dict[TokenId, Annotated[float, Field(ge=-100, le=100)]] = Field({})
    min_tokens: int = Field(0, ge=0)
    stop_token_ids: tuple[TokenId, ...] = ()
    ignore_eos: bool = False
    allowed_token_ids: tuple[TokenId, ...] | None = Field(None, min_length=1)
    bad_words: tuple[Annotated[str, Field(min_length=1)], ...] = ()

    @property
    def options(self) -> StreamOptions:
        return self.stream_options or StreamOptions()

    @property
    def stops(self) -> tuple[str, ...]:
        return tuple(self.stop or ())

    def _require_lengths(self, most: int | None) -> None:
        """most: tokens of the answer. Raises APIError."""
        if self.best_of is not None and self.best_of != self.n:
            raise APIError(
                f"the server makes as many answers as it gives: best_of must be {self.n}, as n, or left out",
                param="best_of",
                code="unsupported",
            )
        if most is not None and self.min_tokens > most:
            raise APIError(
                f"min_tokens {self.min_tokens} are more than the {most} that the answer may have",
                param="min_tokens",
                code="invalid_value",
            )


class ChatRequest(TextFields):
    """`begin_with`: an image stands first in the answer, whatever the model would do."""

    messages: list[Message] = Field(min_length=1)
    modalities: list[Modality] = Field(["text", "image"], min_length=1)
    begin_with: Literal["image"] | None = None
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=20)

    @property
    def limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def alternatives(self) -> int | None:
        """Alternatives a token, None where no log-probabilities were asked for."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        self._require_lengths(self.limit)
        if self.constraint and "text" not in self.modalities:
            raise APIError(
                'a grammar holds for text: it needs "text" among the modalities',
                param="modalities",
                code="invalid_value",
            )
        if self.top_logprobs and not self.logprobs:
            raise APIError("top_logprobs needs logprobs: true", param="top_logprobs", code="invalid_value")
        if self.begin_with and "image" not in self.modalities:
            raise APIError(
                'begin_with: "image" needs "image" among the modalities', param="begin_with", code="invalid_value"
            )
        return self


TokenIds = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]


class CompletionRequest(TextFields):
    """`prompt`: a text or token ids, or a list of either; each gets n answers. `max_tokens` 0 looks at it only."""

    prompt: str | TokenIds | Annotated[list[str], Field(min_length=1)] | Annotated[list[TokenIds], Field(min_length=1)]
    max_tokens: int | None = Field(None, ge=0)
    echo: bool = False
    logprobs: Annotated[int | None, Field(ge=0, le=20)] = None

    @property
    def prompts(self) -> list[str | tuple[int, ...]]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [tuple(self.prompt)]
        return [prompt if isinstance(prompt, str) else tuple(prompt) for prompt in self.prompt]

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        self._require_lengths(self.max_tokens)
        _ = self.constraint  # refused now, not when the answer is wanted
        return self


ImageFormat = Literal["png", "jpeg", "webp"]


class ImageRequest(SamplingFields):
    """`size` may name only what the model draws. `response_format: url` gives data URLs."""

    prompt: str = Field(min_length=1)
    n: int = Field(1, ge=1, le=10)
    size: Annotated[str, Field(pattern=r"^(auto|[1-9]\d{0,4}x[1-9]\d{0,4})$")] | None = None
    response_format: Literal["b64_json", "url"] = "b64_json"
    output_format: ImageFormat = "png"
    output_compression: int = Field(100, ge=0, le=100, description="quality of jpeg and webp, in percent")
    stream: bool = False
    partial_images: int = Field(0, ge=0, le=8)


class TokenizeRequest(RequestModel):
    model: str | None = None
    prompt: str
    add_special_tokens: bool = True


class DetokenizeRequest(RequestModel):
    model: str | None = None
    tokens: list[TokenId]
