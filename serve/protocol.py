"""What passes between the HTTP ingress and an engine replica: a request there, a stream of output events back."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from calumma.model.document import Document
from calumma.model.generation import SamplingParams

# How the special ids are spelled towards clients that need a name for them (lm-evaluation-harness).
BOS, EOS = "<s>", "</s>"


@dataclass(frozen=True)
class GenerationRequest:
    """A prompt to answer: a document, or token ids as a client of /v1/completions gives them.

    max_tokens: None is as many as the context has room for, 0 none (the prompt is only looked at).
    stop: the answer ends before the first of these that occurs in its text.
    logprobs: log-probabilities of text tokens with so many alternatives each; None is none.
    begin_with_image: the answer's first part is an image. echo: Started brings the prompt's text.
    previews: pictures of an unfinished image, spread over its drawing.
    """

    id: str
    prompt: Document | tuple[int, ...]
    params: SamplingParams
    max_tokens: int | None = None
    progress: bool = False
    previews: int = 0
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    begin_with_image: bool = False
    echo: bool = False

    @property
    def param(self) -> str:
        """The request's field that holds the prompt."""
        return "messages" if isinstance(self.prompt, Document) and self.prompt.is_conversation else "prompt"


@dataclass(frozen=True)
class TokenCount:
    text: int = 0
    image: int = 0

    @property
    def total(self) -> int:
        return self.text + self.image


@dataclass(frozen=True)
class Token:
    """A token of a text: its id, its bytes (none for special ids), where in the text it begins, its log-probability
    (None where nothing precedes it) and the most likely alternatives (id, bytes, log-probability), itself included."""

    id: int
    surface: bytes
    begin: int
    logprob: float | None
    top: tuple[tuple[int, bytes, float], ...] = ()


@dataclass(frozen=True)
class TextDelta:
    """More text; `tokens` are those that end in it, where they were asked for."""

    text: str
    tokens: tuple[Token, ...] = ()


@dataclass(frozen=True)
class Started:
    """The prompt was taken in; always the first piece of an accepted job."""

    prompt: TokenCount
    echo: TextDelta | None = None


@dataclass(frozen=True)
class ImageProgress:
    """An image is under way: `done` of `total` codes; perhaps with a picture of what is there."""

    done: int
    total: int
    preview: bytes | None = None


@dataclass(frozen=True)
class ImageOutput:
    """A PNG file; `seconds` from its first token to its last pixel."""

    png: bytes
    seconds: float = 0.0


@dataclass(frozen=True)
class Finished:
    reason: Literal["stop", "length"]
    answer: TokenCount


@dataclass(frozen=True)
class ContentFiltered:
    """The safety policy ends the answer, perhaps before it began. Always the last piece."""

    message: str
    answer: TokenCount = TokenCount()


@dataclass(frozen=True)
class RequestFailed:
    """The job cannot be done (first piece) or failed half-way (last piece): HTTP status and OpenAI's error fields."""

    status: int
    message: str
    param: str | None = None
    code: str | None = None


OutputEvent = Started | TextDelta | ImageProgress | ImageOutput | Finished | ContentFiltered | RequestFailed
FINAL_EVENTS = (Finished, ContentFiltered, RequestFailed)
ENGINE_FAILED = "engine_failed"  # Refused.code


class Backend(Protocol):
    """Answers jobs: a Ray Serve handle in production, a replica of this process in tests."""

    def generate(self, job: GenerationRequest) -> AsyncGenerator[OutputEvent, None]:
        """Pieces of the answer as they come. Closing the generator early abandons the job."""
        ...

    async def describe(self) -> dict[str, Any]:
        """Facts about the model (context, image size, parameters, device). Raises when no replica is well."""
        ...

    async def statistics(self) -> dict[str, dict[str, float]]:
        """Numbers of every replica's engine, by the replica's name."""
        ...

    async def tokenize(self, text: str) -> list[int]:
        """Token ids of a text alone."""
        ...

    async def detokenize(self, ids: list[int]) -> str:
        """The text of token ids."""
        ...
