"""OpenAI's wire format as types: what requests may hold.

Beyond OpenAI: images in answers, sampling fields for images, top_k, min_p, progress and previews in streams.
Reference: platform.openai.com/docs/api-reference/chat.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, ConfigDict, Field, model_validator

from calumma.model.generation.constraint import Constraint
from calumma.serve.http.wire.constraints import ConstraintFields
from calumma.serve.http.wire.content import ImagePart, MessagePart, RefusalPart, RequestModel, TextPart
from calumma.serve.http.wire.errors import APIError
from calumma.serve.http.wire.support import require_supported, warning_headers
from calumma.serve.http.wire.tools import (
    ChatTool,
    FunctionDefinition,
    NamedTool,
    SentCall,
    ToolMode,
    require_tools,
    tools_constraint,
)

Modality = Literal["text", "image"]


def _as_parts(value: Any) -> Any:
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


class Message(RequestModel):
    """`parts`, as this server's own answers carry them, stands for `content` when both are given. Clients that keep
    `content` and `images` of an answer, and lose their order, send back the text before the images."""

    role: Literal["system", "developer", "user", "assistant", "tool"] = Field(
        description="whose turn it is; `developer` is read as `system`, and `tool` is what a call returned"
    )
    content: Annotated[list[MessagePart] | None, BeforeValidator(_as_parts)] = Field(
        None, description="a text, or parts: texts and images"
    )
    parts: list[MessagePart] | None = Field(
        None, description="the same as parts, in the order of an answer; stands for `content`"
    )
    tool_calls: list[SentCall] = Field([], description="what an earlier answer called")
    tool_call_id: str | None = Field(None, description="which call a `tool` message is the result of")
    function_call: None = Field(None, description="calls stand in `tool_calls`")
    audio: None = Field(None, description="answers that were spoken cannot be sent back")

    @model_validator(mode="before")
    @classmethod
    def _with_images(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("refusal") and not values.get("content"):
            values = values | {"content": values["refusal"]}
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

    include_usage: bool = Field(False, description="a last chunk with the counts of tokens")
    include_progress: bool = Field(False, description="chunks that say how far an image is")
    partial_images: int = Field(0, ge=0, le=8, description="pictures of an image under way")


def _unlimited(value: Any) -> Any:
    """vLLM's -1 for no limit."""
    return 0 if value == -1 else value


TopK = Annotated[int, BeforeValidator(_unlimited), Field(ge=0)]


# Signed or not: -2 and 2**64 - 2 are one. -1 is a random one, as in vLLM and llama.cpp.
Seed = Annotated[int, Field(ge=-(2**63), lt=2**64)]


class SamplingFields(RequestModel):
    """Sampling fields that all endpoints take. What is left out comes from the server's settings."""

    model_config = ConfigDict(extra="allow")  # for the warning

    model: str | None = Field(None, description="one of `/v1/models`; none: the first")
    seed: Seed | None = Field(
        None,
        description="makes the answer repeatable, whoever else asks: any integer of 64 bits; -1 is a random one, and "
        "several answers have this one and those after it",
    )
    temperature: float | None = Field(None, ge=0, le=2, description="of text; 0: the likeliest token")
    top_p: float | None = Field(
        None, gt=0, le=1, description="of text: the likeliest tokens that have this share together"
    )
    top_k: TopK | None = Field(None, description="of text: so many of the likeliest; 0 or -1: all")
    min_p: float | None = Field(
        None, ge=0, le=1, description="of text: tokens of at least this share of the likeliest one's"
    )
    repetition_penalty: float | None = Field(
        None, gt=0, le=10, description="of text that the prompt or the answer has already; 1: none"
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
    guidance_begin: float | None = Field(
        None, ge=0, le=1, description="the part of an image's codes from which on it is guided"
    )
    guidance_end: float | None = Field(None, ge=0, le=1, description="the part up to which it is")
    guidance_schedule: Literal["constant", "linear", "cosine"] | None = Field(
        None, description="how guidance rises within that part; constant: it is there at once"
    )
    max_images: int | None = Field(None, ge=1, le=64, description="images in the answer")
    priority: int | None = Field(
        None, description="above 0: others go first, whoever asks, and this request gets what they leave"
    )

    cache_salt: str | None = Field(
        None, max_length=1024, description="what is kept of the prompt is found by requests with the same one alone"
    )

    @property
    def salt(self) -> bytes:
        return (self.cache_salt or "").encode(errors="surrogatepass")

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

    stream: bool = Field(False, description="answer in server-sent events")
    stream_options: StreamOptions | None = Field(None, description="what a stream tells besides")
    n: int = Field(1, ge=1, description="answers to each prompt")
    best_of: int | None = Field(None, ge=1, description="as many as `n`")
    stop: Annotated[list[Annotated[str, Field(min_length=1)]] | None, BeforeValidator(_as_list)] = Field(
        None, description="texts, or one, before which the answer ends"
    )
    presence_penalty: float = Field(0.0, ge=-2, le=2, description="of text that the answer has already")
    frequency_penalty: float = Field(0.0, ge=-2, le=2, description="the same, for each time that it has it")
    logit_bias: dict[TokenId, Annotated[float, Field(ge=-100, le=100)]] = Field(
        {}, description="token ids of text, and what is added to their logits"
    )
    min_tokens: int = Field(0, ge=0, description="the answer does not end before it has so many")
    stop_token_ids: tuple[TokenId, ...] = Field((), description="token ids that end the answer")
    ignore_eos: bool = Field(False, description="the model does not end the answer by itself")
    allowed_token_ids: tuple[TokenId, ...] | None = Field(None, min_length=1, description="the only ids of its text")
    bad_words: tuple[Annotated[str, Field(min_length=1)], ...] = Field((), description="texts that it does not have")

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

    messages: list[Message] = Field(min_length=1, description="the conversation so far")
    modalities: list[Modality] = Field(["text", "image"], min_length=1, description="what the answer may hold")
    begin_with: Literal["image"] | None = Field(None, description="an image stands first, whatever the model would do")
    max_tokens: int | None = Field(None, ge=1, description="of the answer, image codes among them")
    max_completion_tokens: int | None = Field(None, ge=1, description="the same; it wins")
    logprobs: bool = Field(False, description="tell the log-probability of each token")
    top_logprobs: int | None = Field(None, ge=0, le=20, description="and of so many of the likeliest in its place")
    tools: list[ChatTool] = Field([], description="functions that the answer may call")
    tool_choice: ToolMode | NamedTool = Field(
        "auto", description="`required`: the answer is calls; a named function: a call of it; `none`: it calls nothing"
    )
    parallel_tool_calls: bool = Field(True, description="one answer may hold several calls")

    @property
    def limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def alternatives(self) -> int | None:
        """Alternatives a token, None where no log-probabilities were asked for."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def offered(self) -> list[FunctionDefinition]:
        """The functions that the answer may call."""
        return [] if self.tool_choice == "none" else [tool.function for tool in self.tools]

    @property
    def constraint(self) -> Constraint | None:
        text = super().constraint
        if not self.offered:
            return text
        choice = self.tool_choice if isinstance(self.tool_choice, str) else f"={self.tool_choice.function.name}"
        return tools_constraint(self.offered, choice, self.parallel_tool_calls, text)

    @property
    def grammar_field(self) -> str | None:
        return "tools" if self.offered else super().grammar_field

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        self._require_lengths(self.limit)
        require_tools(self.offered, "tools[{}].function")
        if not self.tools and self.tool_choice not in ("none", "auto"):
            raise APIError("tool_choice asks for a call and there are no tools", param="tool_choice")
        if self.constraint and "text" not in self.modalities:
            raise APIError(
                'grammars and tools hold for text: they need "text" among the modalities',
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

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        self._require_lengths(self.max_tokens)
        _ = self.constraint  # refused now, not when the answer is wanted
        return self


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


class TokenizeRequest(RequestModel):
    model: str | None = Field(None, description="one of `/v1/models`; none: the first")
    prompt: str = Field(description="the text")
    add_special_tokens: bool = Field(True, description="begin with the token that begins a sequence")


class DetokenizeRequest(RequestModel):
    model: str | None = Field(None, description="one of `/v1/models`; none: the first")
    tokens: list[TokenId] = Field(description="token ids")
    presence_penalty: float = Field(0.0, ge=-2, le=2, description="of text that the answer has already")
    frequency_penalty: float = Field(0.0, ge=-2, le=2, description="the same, for each time that it has it")
    logit_bias: dict[TokenId, Annotated[float, Field(ge=-100, le=100)]] = Field(
        {}, description="token ids of text, and what is added to their logits"
    )
    min_tokens: int = Field(0, ge=0, description="the answer does not end before it has so many")
    stop_token_ids: tuple[TokenId, ...] = Field((), description="token ids that end the answer")
    ignore_eos: bool = Field(False, description="the model does not end the answer by itself")
    allowed_token_ids: tuple[TokenId, ...] | None = Field(None, min_length=1, description="the only ids of its text")
    bad_words: tuple[Annotated[str, Field(min_length=1)], ...] = Field((), description="texts that it does not have")
