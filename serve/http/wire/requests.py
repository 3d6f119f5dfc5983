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

    role: Literal["system", "developer", "user", "assistant"] = Field(
        description="whose turn it is; `developer` is read as `system`"
    )
    content: Annotated[list[ContentPart] | None, BeforeValidator(_as_parts)] = Field(
        None, description="a text, or parts: texts and images"
    )
    parts: list[ContentPart] | None = Field(
        None, description="the same as parts, in the order of an answer; stands for `content`"
    )

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

    include_usage: bool = Field(False, description="a last chunk with the counts of tokens")
    include_progress: bool = Field(False, description="chunks that say how far an image is")
    partial_images: int = Field(0, ge=0, le=8, description="pictures of an image under way")


def _unlimited(value: Any) -> Any:
    """vLLM's -1 for no limit."""
    return 0 if value == -1 else value


TopK = Annotated[int, BeforeValidator(_unlimited), Field(ge=0)]


class SamplingFields(WireModel):
    """Sampling fields that all endpoints take. What is left out comes from the server's settings."""

    model: str | None = Field(None, description="one of `/v1/models`; none: the first")
    seed: int | None = Field(None, ge=0, lt=2**63, description="makes the answer repeatable, whoever else asks")
    temperature: float | None = Field(None, ge=0, le=2, description="of text; 0: the likeliest token")
    top_p: float | None = Field(
        None, gt=0, le=1, description="of text: the likeliest tokens that have this share together"
    )
    top_k: TopK | None = Field(None, description="of text: so many of the likeliest; 0 or -1: all")
    min_p: float | None = Field(
        None, ge=0, le=1, description="of text: tokens of at least this share of the likeliest one's"
    )
    repetition_penalty: float | None = Field(
        None, gt=0, le=10, description="of text that the answer has already; 1: none"
    )
    image_temperature: float | None = Field(None, ge=0, le=2, description="of image codes")
    image_top_p: float | None = Field(None, gt=0, le=1, description="of image codes")
    image_top_k: TopK | None = Field(None, description="of image codes; 0 or -1: all")
    image_min_p: float | None = Field(None, ge=0, le=1, description="of image codes")
    guidance_text: float | None = Field(
        None, ge=0, le=100, description="how far an image follows the text before it; 1: no guidance"
    )
    guidance_image: float | None = Field(
        None, ge=0, le=100, description="how far an image follows the images before it; 1: no guidance"
    )
    max_images: int | None = Field(None, ge=1, le=64, description="images in the answer")

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

    stream: bool = Field(False, description="answer in server-sent events")
    stream_options: StreamOptions | None = Field(None, description="what a stream tells besides")
    n: int = Field(1, ge=1, description="answers to each prompt")
    stop: Annotated[list[Annotated[str, Field(min_length=1)]] | None, BeforeValidator(_as_list)] = Field(
        None, description="texts, or one, before which the answer ends"
    )

    @property
    def options(self) -> StreamOptions:
        return self.stream_options or StreamOptions()

    @property
    def stops(self) -> tuple[str, ...]:
        return tuple(self.stop or ())


class ChatRequest(_TextFields):
    """`begin_with`: an image stands first in the answer, whatever the model would do."""

    messages: list[Message] = Field(min_length=1, description="the conversation so far")
    modalities: list[Modality] = Field(["text", "image"], min_length=1, description="what the answer may hold")
    begin_with: Literal["image"] | None = Field(None, description="an image stands first, whatever the model would do")
    max_tokens: int | None = Field(None, ge=1, description="of the answer, image codes among them")
    max_completion_tokens: int | None = Field(None, ge=1, description="the same; it wins")
    logprobs: bool = Field(False, description="tell the log-probability of each token")
    top_logprobs: int | None = Field(None, ge=0, le=20, description="and of so many of the likeliest in its place")

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

    prompt: (
        str | TokenIds | Annotated[list[str], Field(min_length=1)] | Annotated[list[TokenIds], Field(min_length=1)]
    ) = Field(description="a text or token ids, or a list of either; each gets `n` answers")
    max_tokens: int | None = Field(None, ge=0, description="of the answer; 0 looks at the prompt only")
    echo: bool = Field(False, description="the prompt stands before the answer")
    logprobs: Annotated[int | None, Field(ge=0, le=20)] = Field(
        None, description="log-probabilities of each token and of so many of the likeliest in its place"
    )

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

    prompt: str = Field(min_length=1, description="what to draw")
    n: int = Field(1, ge=1, le=10, description="images")
    size: Annotated[str, Field(pattern=r"^(auto|[1-9]\d{0,4}x[1-9]\d{0,4})$")] | None = Field(
        None, description="may name only what the model draws"
    )
    response_format: Literal["b64_json", "url"] = Field("b64_json", description="`url` gives data URLs")
    output_format: ImageFormat = Field("png", description="file format of the images")
    output_compression: int = Field(100, ge=0, le=100, description="quality of jpeg and webp, in percent")
    stream: bool = Field(False, description="answer in server-sent events")
    partial_images: int = Field(0, ge=0, le=8, description="pictures of an image under way, in a stream")


class TokenizeRequest(WireModel):
    model: str | None = Field(None, description="one of `/v1/models`; none: the first")
    prompt: str = Field(description="the text")
    add_special_tokens: bool = Field(True, description="begin with the token that begins a sequence")


class DetokenizeRequest(WireModel):
    model: str | None = Field(None, description="one of `/v1/models`; none: the first")
    tokens: list[Annotated[int, Field(ge=0)]] = Field(description="token ids")
