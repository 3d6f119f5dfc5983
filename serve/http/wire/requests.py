"""OpenAI's wire format as types: what requests may hold.

Beyond OpenAI: images in answers, sampling fields for images, top_k, min_p, progress and previews in streams.
Reference: platform.openai.com/docs/api-reference/chat.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from calumma.serve.http.wire.content import ContentPart, ImagePart, TextPart, WireModel
from calumma.serve.http.wire.errors import APIError

Modality = Literal["text", "image"]


def _as_parts(value: Any) -> Any:
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


class Message(WireModel):
    """`parts`, as this server's own answers carry them, stands for `content` when both are given."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[list[ContentPart] | None, BeforeValidator(_as_parts)] = None
    parts: list[ContentPart] | None = None

    @property
    def field(self) -> Literal["parts", "content"]:
        return "parts" if self.parts else "content"

    @property
    def body(self) -> list[TextPart | ImagePart]:
        return self.parts or self.content or []


# Fields of OpenAI's that would change the answer and that this server does not have: field -> values without effect.
UNSUPPORTED_FIELDS: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "stop": ([],),
    "tools": ([],),
    "functions": ([],),
    "logit_bias": ({},),
    "suffix": ("",),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "response_format": ({"type": "text"},),
    "audio": (),
    "quality": ("auto", "standard"),
    "style": ("natural", "vivid"),
    "background": ("auto", "opaque"),
}


class StreamOptions(WireModel):
    """`include_progress` adds chunks that say how far an image under way is; `partial_images` of them a picture."""

    include_usage: bool = False
    include_progress: bool = False
    partial_images: int = Field(0, ge=0, le=8)


def _unlimited(value: Any) -> Any:
    """vLLM's -1 for no limit."""
    return 0 if value == -1 else value


TopK = Annotated[int, BeforeValidator(_unlimited), Field(ge=0)]


class SamplingFields(WireModel):
    """Sampling fields that all endpoints take. What is left out comes from the server's settings."""

    model: str | None = None
    seed: int | None = Field(None, ge=0, lt=2**63)
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
            for field, harmless in UNSUPPORTED_FIELDS.items():
                given = values.get(field)
                if field in cls.model_fields or given is None or given in harmless:
                    continue
                raise APIError(f"this server has no `{field}`; leave it out", param=field, code="unsupported")
        return values


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


class _TextFields(SamplingFields):
    """What the endpoints have in common that answer with text."""

    stream: bool = False
    stream_options: StreamOptions | None = None
    n: int = Field(1, ge=1)
    stop: Annotated[list[Annotated[str, Field(min_length=1)]] | None, BeforeValidator(_as_list)] = None

    @property
    def options(self) -> StreamOptions:
        return self.stream_options or StreamOptions()

    @property
    def stops(self) -> tuple[str, ...]:
        return tuple(self.stop or ())


class ChatRequest(_TextFields):
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
        if self.top_logprobs and not self.logprobs:
            raise APIError("top_logprobs needs logprobs: true", param="top_logprobs", code="invalid_value")
        if self.begin_with and "image" not in self.modalities:
            raise APIError(
                'begin_with: "image" needs "image" among the modalities', param="begin_with", code="invalid_value"
            )
        return self


TokenIds = Annotated[list[int], Field(min_length=1)]


class CompletionRequest(_TextFields):
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


class TokenizeRequest(WireModel):
    model: str | None = None
    prompt: str
    add_special_tokens: bool = True


class DetokenizeRequest(WireModel):
    model: str | None = None
    tokens: list[Annotated[int, Field(ge=0)]]
